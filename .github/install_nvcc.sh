#!/bin/bash
# Installs the CUDA 12.8 compiler in a manylinux_2_28 container (AlmaLinux 8). 12.8 is the first release with sm_120.
set -euo pipefail
case "$(uname -m)" in
  x86_64) repository=x86_64 ;;
  aarch64) repository=sbsa ;;
  *) echo "no CUDA compiler for $(uname -m)" >&2; exit 1 ;;
esac
dnf install -y dnf-plugins-core
dnf config-manager --add-repo "https://developer.download.nvidia.com/compute/cuda/repos/rhel8/$repository/cuda-rhel8.repo"
dnf install -y cuda-nvcc-12-8 cuda-cudart-devel-12-8
/usr/local/cuda-12.8/bin/nvcc --version
