// Computes the panel with the kernel that is faster for the number of edits, or with both.
#pragma once

#include "panel_narrow.hpp"
#include "panel_wide.hpp"

namespace {

void run_panel(const rlsedit::Panel& a) {
    // The few edits beyond whole vectors are faster on their own than in a mostly empty vector.
    const int64_t few = a.n % lanes;
    const bool apart = lanes == 16 && a.n > 2 * lanes && few > 0 && narrow_wins(few);
    if (!apart) return narrow_wins(a.n) ? run_narrow(a) : run_wide(a);
    const int64_t many = a.n - few;
    rlsedit::Panel first = a, rest = a;
    first.n = many;
    rest.n = few;
    rest.keys += many * a.d;
    rest.out += many * a.d;
    run_wide(first);
    run_narrow(rest);
}

}  // namespace
