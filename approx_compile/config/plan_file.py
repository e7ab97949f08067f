"""Read, merge and write tuned plans.

A plan file holds settings, which are the keys of `options` as TOML that a person may edit, and a record of the tuning in the table `tuned`. `ApproxConfig`
checks the settings like any others. The record names every site of the model that the plan was made for, so that a plan for another model is refused
(`passes.planning.plan_validation`) instead of silently having no effect.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic
import tomlkit
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.table import Table
from tomlkit.exceptions import TOMLKitError

from approx_compile.reasons.tuning import NOT_MEASURED

RECORD = "tuned"
"""The key of the table in a plan file that holds the record instead of settings."""


class TunedSite(BaseModel):
    """One site of the model that was tuned."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="The site's name.")
    op: str = Field(description="The kind of op.")
    shape: str = Field(description="The shape of the site's product, as text.")
    dtype: str = Field(description="The dtype of the product.")
    ratio: float = Field(default=1.0, description="The share that is kept, 1 for an exact site.")
    saved: float = Field(default=0.0, description="The predicted time saved, as a share of the exact step's time.")
    error: float = Field(default=0.0, description="The relative error e = |g' - g| / |g| of the whole gradient g with only this site approximated.")
    reason: str | None = Field(default=None, description="Why an exact site is exact.")


class Tuned(BaseModel):
    """The record of a plan: what it was made for, and with what result.

    Times are in milliseconds, for one training step without the optimizer (on one CPU thread: process time). None means not measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="The name of the model's class.")
    torch: str = Field(description="The version of torch.")
    device: str = Field(description="The type of the device.")
    threads: int = Field(description="The number of CPU threads.")
    max_error: float = Field(description="The largest relative error e = |g' - g| / |g| of the gradient g that was allowed.")
    error: float | None = Field(default=None, description="The relative error of the whole gradient under the plan.")
    predicted_speedup: float = Field(default=1.0, description="The predicted ratio of the exact step's time to the plan's.")
    achieved_speedup: float | None = Field(default=None, description="The measured ratio.")
    step_exact_ms: float | None = Field(default=None, description="The time of an exact step.")
    step_ms: float | None = Field(default=None, description="The time of a step under the plan.")
    rows: float | None = Field(default=None, description="The share of the rows that the backward pass runs on; None if the plan does not sample rows.")
    stopped: str | None = Field(default=None, description="Why tuning ended early, if it did.")
    sites: tuple[TunedSite, ...] = Field(default=(), description="The sites of the model.")

    def fingerprint(self) -> list[tuple[str, str]]:
        """Return the names and shapes of the sites, which decide whether the plan fits a model."""
        return [(s.name, s.shape) for s in self.sites]


@dataclass(frozen=True)
class TunedPlan:
    """Settings and the record of how they were found. `torch.compile(model, backend="approx", options={"plan": plan})` runs a plan.

    `str()` of a plan is a table for people, with predicted and achieved speed-up.

    Attributes:
        options: Settings, with the keys of `ApproxConfig`.
        tuned: The record; None in a file that was written by hand.
        comments: Comments that the file has beside a rule, by the rule's layers.

    Example:
        >>> import approx_compile
        >>> plan = approx_compile.TunedPlan({"policy": "always", "method": "exact", "rules": [{"layers": "0", "method": "topk", "ratio": 0.5}]})
        >>> plan.save("plan.toml")
        >>> approx_compile.TunedPlan.load("plan.toml") == plan
        True
        >>> approx_compile.ApproxConfig(plan="plan.toml").rules[0].ratio
        0.5
    """

    options: Mapping[str, Any]
    tuned: Tuned | None = None
    comments: Mapping[str, str] = field(default_factory=dict, compare=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as TOML.

        Args:
            path: Where to write it.

        Raises:
            OSError: The path cannot be written.
        """
        Path(path).write_text(self.to_toml(), encoding="utf-8")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> TunedPlan:
        """Read a plan file. Its settings are checked only when a config is made of them.

        Args:
            path: The plan file.

        Returns:
            The plan.

        Raises:
            ValueError: The file cannot be read, is not TOML, or has a wrong record. The message names the place of the error.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            reason = e.strerror if isinstance(e, OSError) else "no UTF-8 text"
            raise ValueError(f"plan file {str(path)!r}: {reason}; approx_compile.tune(model, *inputs).save(path) writes one") from None
        try:
            content = tomlkit.parse(text).unwrap()
        except TOMLKitError as e:
            raise ValueError(f"plan file {str(path)!r} is no TOML: {e}") from None
        return TunedPlan.of(content, f"plan file {str(path)!r}")

    @staticmethod
    def of(content: Mapping[str, Any], where: str) -> TunedPlan:
        """Make a plan from the content of a plan file.

        Args:
            content: The content.
            where: What error messages begin with.

        Returns:
            The plan.

        Raises:
            ValueError: The content names another plan, or its record is wrong.
        """
        options = {k: v for k, v in content.items() if k != RECORD}
        if "plan" in options:
            raise ValueError(f"{where}: key 'plan': a plan holds no other plan; write its keys out")
        if RECORD not in content:
            return TunedPlan(options)
        try:
            return TunedPlan(options, Tuned.model_validate(content[RECORD]))
        except pydantic.ValidationError as e:
            first = e.errors(include_url=False)[0]
            place = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"])
            raise ValueError(f"{where}: {RECORD}{place}: {first['msg']}; leave the table {RECORD!r} out to run the settings on any model") from None

    @staticmethod
    def given(value: Any) -> tuple[TunedPlan, str]:
        """Return the plan that the key `plan` asks for.

        Args:
            value: The value of the key: a path, a plan, or the content of a plan file.

        Returns:
            The plan, and what to call it in messages.

        Raises:
            ValueError: The value is none of these, or the plan is wrong.
        """
        if isinstance(value, TunedPlan):
            return value, "plan"
        if isinstance(value, (str, os.PathLike)):
            return TunedPlan.load(value), f"plan file {str(value)!r}"
        if isinstance(value, Mapping):
            return TunedPlan.of(value, "plan"), "plan"
        raise ValueError(f"plan: got {value!r}; the path of a plan file, a TunedPlan or a table like a plan file is expected")

    def overridden(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Return the plan's settings, overridden by other keys.

        The keys override those at the top of the plan and in each of its rules, except that what the plan leaves exact stays exact. The rules in `overrides`
        come after the plan's. With `method: exact` in `overrides` the plan's rules are dropped, so that everything is exact except what the rules in
        `overrides` name.

        Args:
            overrides: The keys given beside the plan.

        Returns:
            The merged settings.
        """
        rest = {k: v for k, v in overrides.items() if k != "rules"}
        if overrides.get("method") == "exact":
            top = {k: v for k, v in self.options.items() if k not in _SAMPLING and k != "rules"} | rest
            return top | {"rules": list(overrides.get("rules", ()))}
        top = _over(self.options, overrides) | {k: v for k, v in rest.items() if k not in _SAMPLING}
        return top | {"rules": [*(_over(r, overrides) for r in self.options.get("rules", ())), *overrides.get("rules", ())]}

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the plan file as plain types, for JSON."""
        record = {RECORD: self.tuned.model_dump(exclude_none=True)} if self.tuned is not None else {}
        content: dict[str, Any] = _plain(dict(self.options) | record)
        return content

    def to_toml(self) -> str:
        """Return the text of the plan file."""
        content = self.to_dict()
        record, rules = content.pop(RECORD, None), content.pop("rules", [])
        document = tomlkit.document()
        for line in _HEADER:
            document.add(tomlkit.comment(line))
        for key, value in content.items():
            document.add(key, tomlkit.item(_inline(value)))
        if rules:
            document.add("rules", self._rules(rules))
        if record is not None:
            document.add(RECORD, _record(record))
        return tomlkit.dumps(document)

    def _rules(self, rules: Sequence[Mapping[str, Any]]) -> tomlkit.items.AoT:
        tables = tomlkit.aot()
        for rule in rules:
            table = tomlkit.table()
            for key, value in rule.items():
                table.add(key, tomlkit.item(_inline(value)))
            if comment := self.comments.get(str(rule["layers"])):
                table["layers"].comment(comment)  # type: ignore[union-attr]
            tables.append(table)
        return tables

    def __str__(self) -> str:
        if self.tuned is None:
            return self.to_toml()
        out = io.StringIO()
        console = Console(file=out, width=140)
        console.print(_table(self.tuned), highlight=False)
        for line in _lines(self.tuned):
            console.print(line, highlight=False, markup=False)
        return out.getvalue().rstrip()


_HEADER = (
    "A plan of approx_compile.tune: the keys of `options`, to be edited freely. [tuned] is the record of how they were",
    "found; the plan is refused where a site named there is missing or has another weight.",
)

_SAMPLING = ("method", "ratio", "sampling", "output", "grad", "grad_input", "grad_weight")
"""Keys that say what is sampled. They do not override what a plan leaves exact."""

_EVERYWHERE = (*_SAMPLING, "min_k", "group", "policy")
"""Keys that override those of every rule of a plan."""


def _over(table: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A plan's settings at the top or in a rule, with the keys of `overrides` that may override them."""
    exact = table.get("method") == "exact"
    return dict(table) | {k: v for k, v in overrides.items() if k in _EVERYWHERE and not (exact and k in _SAMPLING)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _inline(value: Any) -> Any:
    """A nested table as an inline table, on one line; other values as they are."""
    if not isinstance(value, Mapping):
        return value
    table = tomlkit.inline_table()
    for k, v in value.items():
        table.add(k, _inline(v))
    return table


def _record(record: Mapping[str, Any]) -> tomlkit.items.Table:
    table = tomlkit.table()
    for key, value in record.items():
        if key != "sites":
            table.add(key, value)
    sites = tomlkit.array().multiline(True)
    for site in record.get("sites", ()):
        sites.append(_inline(site))
    table.add("sites", sites)
    return table


def _table(tuned: Tuned) -> Table:
    table = Table(title=f"plan for {tuned.model}")
    for title in ("site", "op", "shape"):
        table.add_column(title, overflow="fold")
    for title in ("kept", "saves of the step", "gradient error alone"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("exact because", overflow="fold")
    for s in tuned.sites:
        sampled = s.ratio < 1
        table.add_row(
            s.name,
            s.op,
            s.shape,
            f"{s.ratio:g}" if sampled else "all",
            f"{s.saved:.1%}" if sampled else "",
            f"{s.error:.3g}" if sampled else "",
            s.reason or "",
        )
    return table


NOTHING_PAYS = "everything stays exact: nothing that was measured saves time within the error allowed"


def _not_measured(count: int, of: int) -> str:
    more = "give tune more time (time_budget_s, --budget)"
    return f"no plan: {count} of {of} layers were not measured, so whether they would pay is not known; {more}. Until then they run exact"


def _lines(tuned: Tuned) -> list[str]:
    achieved = f"{tuned.achieved_speedup:.2f}x" if tuned.achieved_speedup is not None else "not measured"
    times = f" ({tuned.step_exact_ms:.4g} ms -> {tuned.step_ms:.4g} ms a step)" if tuned.step_ms is not None and tuned.step_exact_ms is not None else ""
    error = f"{tuned.error:.3f}" if tuned.error is not None else "not measured"
    lines = [f"speed-up: predicted {tuned.predicted_speedup:.2f}x, achieved {achieved}{times}", f"gradient error: {error}, at most {tuned.max_error:g} allowed"]
    if tuned.rows is not None:
        lines.append(f"the backward pass runs on {tuned.rows:g} of the rows")
    elif all(s.ratio == 1 for s in tuned.sites):
        unmeasured = sum(s.reason is not None and s.reason.startswith(NOT_MEASURED.text) for s in tuned.sites)
        lines.append(_not_measured(unmeasured, len(tuned.sites)) if unmeasured else NOTHING_PAYS)
    return lines + ([f"stopped early: {tuned.stopped}"] if tuned.stopped else [])
