"""The directives of the page on the Python interface: every public name of the package, by what it is for."""

from __future__ import annotations

import inspect

import approx_compile

TOPICS = {
    "Compile a model": ("Backend", "ApproxConfig", "presets", "annotate"),
    "See what is done": ("explain", "Report", "decisions", "Decisions", "metrics", "controls", "Control"),
    "Choose settings": ("recommend", "Recommendation", "tune", "TunedPlan"),
    "Save, resume and schedule": ("state_dict", "load_state_dict", "set_step", "set_phase"),
    "Errors and warnings": ("ConfigError", "ApproxWarning"),
}


def directive(name: str) -> str:
    """The autodoc directive of a public name."""
    value = getattr(approx_compile, name)
    if inspect.ismodule(value):
        return f".. automodule:: {value.__name__}\n   :members:\n"
    if name == "ApproxConfig":  # its keys have a page of their own
        return f".. autoclass:: approx_compile.{name}\n   :members: of, at, options, digest\n"
    if inspect.isclass(value):
        return f".. autoclass:: approx_compile.{name}\n   :members:\n   :inherited-members: BaseException\n"
    return f".. autofunction:: approx_compile.{name}\n"


def page() -> str:
    """A section for each topic. Raises ValueError if a public name is in none of them."""
    listed = [name for names in TOPICS.values() for name in names]
    if sorted(listed) != sorted(approx_compile.__all__):
        raise ValueError(f"api page: not in exactly one topic: {sorted(set(listed) ^ set(approx_compile.__all__))}")
    sections = []
    hook = [".. autofunction:: approx_compile.distributed.register\n", ".. autoclass:: approx_compile.distributed.ReducedAllReduce\n   :members:\n"]
    for topic, names in TOPICS.items():
        body = "\n".join(directive(name) for name in names)
        sections.append(f"## {topic}\n\n```{{eval-rst}}\n{body}```")
    sections.append("## Data-parallel training\n\n```{eval-rst}\n" + "\n".join(hook) + "```")
    return "\n\n".join(sections)


def blocks() -> dict[str, str]:
    """The blocks that this module makes, by name."""
    return {"api": page()}
