"""The mode audit as lines of a report, or the reason why there is none."""

from typing import Any

from pyro_sb.diagnostics.export.draws_of import is_container
from pyro_sb.diagnostics.modes.audited import MORE, ModeAudit
from pyro_sb.diagnostics.modes.mode_audit import mode_audit
from pyro_sb.diagnostics.reports.lines import Line

__all__ = ["audit_or_why", "lines_of_audit"]


def audit_or_why(
    x: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], modes: bool | ModeAudit
) -> tuple[ModeAudit | None, str]:
    """The audit of a run or posterior; or None, and why."""
    if isinstance(modes, ModeAudit):
        return modes, ""
    if not modes:
        return None, "modes=False"
    if model is None and is_container(x):
        return None, "pass model and args for the audit"
    try:
        if model is not None:
            return mode_audit(model, x, args=args, kwargs=kwargs), ""
        return mode_audit(x), ""
    except (ValueError, NotImplementedError) as error:
        return None, f"no audit: {error}"


def lines_of_audit(audit: ModeAudit) -> list[Line]:
    """Its lines under the report's names; a larger audit is asked for by the words that `report` understands."""
    larger = f"pass modes=mode_audit(..., num_particles={4 * len(audit.populations[0].points)})"
    return [
        Line(f"modes: {line.name}", line.value, line.verdict, line.note.replace(MORE, larger)) for line in audit.lines
    ]
