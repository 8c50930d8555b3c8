// The kernels in vectors of four, which every compiler target can express.
#define RLSEDIT_LANES 4
#include "correct_split.hpp"
#include "panel.hpp"

void rlsedit::panel_portable(const Panel& arguments) { run_panel(arguments); }

void rlsedit::correct_split_portable(const CorrectSplit& arguments) { run_correct_split(arguments); }
