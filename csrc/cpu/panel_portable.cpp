// The panel kernel in vectors of four, which every compiler target can express.
#define RLSEDIT_LANES 4
#include "panel_kernel.hpp"

void rlsedit::panel_portable(const Panel& arguments) { run(arguments); }
