"""What a result file records about where it was taken."""

from __future__ import annotations

import datetime
import os

from rlsedit_fast import doctor


def context() -> dict[str, object]:
    """Versions, machine, the day in UTC and the load of the last minute, which should be the benchmark's own."""
    facts = doctor.report()
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {
        "date": today,
        "load": os.getloadavg()[0],
        "machine": facts["machine"],
        "versions": facts["versions"],
        "build": facts["build"],
    }
