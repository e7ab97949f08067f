"""Why `tune` leaves a site exact."""

from approx_compile.reasons.reason import NOTHING_TO_DO, Template

_TIME = "Give `tune` more time (`time_budget_s`)."
NOT_MEASURED = Template("not-measured", "not measured", _TIME)
TIME_NOT_MEASURED = Template("time-not-measured", "not measured: the time it saves (gradient error {error:.2g} at {ratio:g})", _TIME)
ERROR_TOO_LARGE = Template("error-too-large", "gradient error {error:.2g} at {ratio:g}", "Allow a larger `max_error`, if accuracy permits.")
ROWS_SAVE_MORE = Template("rows-save-more", "rows save more", NOTHING_TO_DO + "the plan runs the backward pass on some of the rows instead.")
SAVES_NOTHING = Template("saves-nothing", "predicted to save {saved:.1%} at {ratio:g}", NOTHING_TO_DO + "sampled, the layer would take no less time.")
ERROR_TOO_DEAR = Template(
    "error-too-dear",
    "error {error:.2g} for {saved:.1%} of the step at {ratio:g}",
    NOTHING_TO_DO + "other layers save more time for the same error. A larger `max_error` may take this one in.",
)
