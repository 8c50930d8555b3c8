"""What a result file records about where it was taken."""

from __future__ import annotations

import datetime

from rlsedit_fast import doctor


def context() -> dict[str, object]:
    """Versions, machine and the day, in UTC."""
    facts = doctor.report()
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"date": today, "machine": facts["machine"], "versions": facts["versions"], "build": facts["build"]}
