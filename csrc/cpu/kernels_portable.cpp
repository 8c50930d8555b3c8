// The kernels in vectors of four, which every compiler target can express.
#define RLSEDIT_LANES 4
#include "correct_split.hpp"
#include "panel_narrow.hpp"
#include "panel_wide.hpp"

void rlsedit::panel_portable(const Panel& arguments) {
    narrow_wins(arguments.n) ? run_narrow(arguments) : run_wide(arguments);
}

void rlsedit::correct_split_portable(const CorrectSplit& arguments) { run_correct_split(arguments); }
