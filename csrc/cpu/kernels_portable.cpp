// The kernels with vectors of four floats, for every target.
#define RLSEDIT_LANES 4
#include "correct_split.hpp"
#include "panel.hpp"

void rlsedit::panel_portable(const Panel& arguments) { run_panel(arguments); }

void rlsedit::correct_split_portable(const CorrectSplit& arguments) { run_correct_split(arguments); }
