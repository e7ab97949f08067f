"""The HTML report holds everything, loads nothing from elsewhere, and in a real browser it opens, sorts and draws."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import mlp
from torch import Tensor, nn

from approx_compile import Report, explain
from approx_compile.reasons import Reason
from approx_compile.tools.report.html import difference
from approx_compile.tools.report.plots import COLORS, Roof, roofline, site_graph
from approx_compile.tools.report.report_data import SiteReport

ALWAYS: dict[str, Any] = {"policy": "always", "ratio": 0.5, "group": 1}
EVIL = "<img src=x onerror=alert(1)>&amp;"


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 96), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.d(h + self.b(h) * self.c(h)[:, :64])


@pytest.fixture(scope="module")
def small() -> Report:
    """A report without times, as of a device that has no profile."""
    found = explain(Branch(), torch.randn(8, 16), config=ALWAYS | {"rules": [{"layers": ["b", "nowhere"], "sampling": "backward"}]})
    none = {"time_exact_us": None, "time_sampled_us": None}
    sites = [replace(s, **none, products={n: replace(p, **none) for n, p in s.products.items()}) for s in found.sites]
    return replace(found, sites=sites)


@dataclass(frozen=True)
class Peaks:
    """A machine of 40 GFLOP/s and 8 GB/s."""

    dtype: str = "float32"

    def dtypes(self) -> list[str]:
        return [self.dtype]

    def peak_gflops(self, dtype: str) -> float:
        return {self.dtype: 40.0}[dtype]

    def bandwidth_gb_s(self) -> float:
        return 8.0


def many(report: Report, count: int) -> Report:
    """Return a report with a chain of `count` sites like those of `report`."""
    sites = [replace(report.sites[i % 4], name=f"blocks.{i}.fc", reads=(f"blocks.{i - 1}.fc",) if i else ()) for i in range(count)]
    return Report(sites=sites, before=report.before, after=report.after)


class Page(HTMLParser):
    """Collect texts by element, and everything that a browser would fetch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {}
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        self.fetched += [f"{tag} {own[k]}" for k in ("src", "srcset", "data", "action") if k in own]
        if tag in ("link", "base", "iframe", "object", "img"):
            self.fetched.append(tag)
        if tag == "a" and not str(own.get("href")).startswith("#"):
            self.fetched.append(f"a {own.get('href')}")
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data


def written(report: Report, path: Path, machine: Peaks | None = None) -> Page:
    report.to_html(path, machine)
    page = Page(path)
    assert page.open == []
    return page


# --- the file ---


@pytest.mark.slow
def test_self_contained_with_every_site_product_and_total(small: Report, tmp_path: Path) -> None:
    page = written(small, tmp_path / "report.html")
    assert page.fetched == []
    for css in page.texts["style"]:
        assert not re.search(r"@import|url\(\s*['\"]?(?!data:)", css)
    cells = page.texts["td"]
    assert [cells.count(s.name) for s in small.sites] == [1 + len(s.products) for s in small.sites]
    assert all(s.reason in cells and s.shape in cells for s in small.sites)
    totals = page.texts["section"][0]
    assert f"{sum(s.decision == 'sampled' for s in small.sites)} of 4" in totals and f"{small.flops_sampled / small.flops_exact:.0%}" in totals
    assert "nowhere" in page.texts["code"]
    assert any("peaks were not given" in text for text in page.texts["p"])


@pytest.mark.slow
def test_names_and_reasons_are_escaped(tmp_path: Path) -> None:
    model = nn.Sequential(OrderedDict([(EVIL, nn.Linear(64, 64)), ("b", nn.Linear(64, 64))]))
    report = explain(model, torch.randn(8, 64), config=ALWAYS | {"rules": [{"layers": "</script><b>", "ratio": 0.1}]})
    assert report.sites[0].name == EVIL and report.unmatched == ["</script><b>"]
    report.sites[1] = replace(report.sites[1], reason=Reason("</td><script>alert(2)</script>"))
    page = written(report, tmp_path / "report.html")
    assert EVIL in page.texts["td"] and page.fetched == [] and "</script><b>" in page.texts["code"]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in text and "<script>alert" not in text and text.count("<script") == text.count("</script>")


@pytest.mark.slow
def test_cuts(tmp_path: Path, small_work_counts: None) -> None:
    report = explain(mlp(64, 256, 256, 10), torch.randn(32, 64), config={"grad": {"axis": "rows", "ratio": 0.25}})
    (cut,) = report.cuts
    page = written(report, tmp_path / "report.html")
    assert cut.decision == "rows" and "0.25 of the rows" in page.texts["td"] and cut.reason in page.texts["td"]
    assert page.texts["td"].count("backward on rows") == sum(any(p.decision == "rows" for p in s.products.values()) for s in report.sites) > 0


def test_replaced_gradients_and_schedules(tmp_path: Path) -> None:
    rules = [{"layers": "0", "output": "exact", "grad_weight": "zero"}, {"layers": "2", "steps": "100:", "ratio": 0.25}]
    report = explain(mlp(64, 64, 64), torch.randn(8, 64), config=ALWAYS | {"rules": rules})
    page = written(report, tmp_path / "report.html")
    assert page.texts["td"].count("gradient replaced") == page.texts["td"].count("replaced") == 1
    assert any(f"one of {report.assignments} assignments" in text for text in page.texts["p"]) and report.assignments > 1
    drawn_as = {t.name for t in site_graph(report).data} - {"edges"}
    assert drawn_as == {"gradient replaced", "sampled"}
    assert json.loads(json.dumps(report.to_dict()))["assignments"] == report.assignments


def test_nothing_found(tmp_path: Path) -> None:
    page = written(explain(torch.relu, torch.randn(4)), tmp_path / "report.html")
    assert any("No matrix product" in text for text in page.texts["p"])


@pytest.mark.slow
def test_times_are_drawn_where_a_report_has_them(small: Report, tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Timed(SiteReport):
        time_exact_us: float | None
        time_sampled_us: float | None

    known = [{f.name: getattr(s, f.name) for f in fields(SiteReport)} for s in small.sites]
    times = [(200.0, 50.0), (300.0, 50.0), (None, None), (500.0, 100.0)]
    timed = [Timed(**k | {"time_exact_us": a, "time_sampled_us": b}) for k, (a, b) in zip(known, times, strict=True)]
    page = written(replace(small, sites=timed), tmp_path / "report.html")
    assert "1k → 200" in page.texts["section"][0] and "time, µs" in page.texts["h3"]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    table = text[text.index('id="site-table"') : text.index("</table>")]
    assert table.count("<td") == len(timed) * table.count("<th ")
    untimed = [Timed(**k | {"time_exact_us": None, "time_sampled_us": None}) for k in known]
    assert "time, µs" not in written(replace(small, sites=untimed), tmp_path / "without.html").texts["h3"]


@pytest.mark.slow
def test_machine_without_a_dtype_and_with(small: Report, tmp_path: Path) -> None:
    for machine, said in (
        (None, "peaks were not given"),
        (Peaks("bfloat16"), "No peaks were given for float32"),
        (Peaks(), "the most that the machine allows"),
    ):
        assert any(said in text for text in written(small, tmp_path / "report.html", machine).texts["p"])


def test_changed_lines_are_marked() -> None:
    found = difference("a\n\nb\nc < d\n", "a\n\nB\nc < d\ne\n")
    assert (found.removed, found.added) == (1, 2)
    assert re.findall(r'<span class="hll">(.*?)\n?</span>', found.before, re.S) == ["b"]
    assert re.findall(r'<span class="hll">(.*?)\n?</span>', found.after, re.S) == ["B", "e"]
    assert "c &lt; d" in found.before and '<span class="gd">-b</span>' in found.changes


def test_unwritable_and_missing_library(small: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="nowhere"):
        small.to_html(tmp_path / "nowhere" / "report.html")
    for name in ("itables", "itables.options"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"to_html needs itables.*pip install 'approx-compile\[report\]'"):
        small.to_html(tmp_path / "report.html")


# --- the figures ---


def test_graph_of_sites(small: Report) -> None:
    figure = site_graph(small)
    nodes = [t for t in figure.data if t.name != "edges"]
    assert sorted(text.split("<br>")[0] for t in nodes for text in t.hovertext) == ["a", "b", "c", "d"]
    assert {t.marker.color for t in nodes} <= set(COLORS.values())
    place = {text.split("<br>")[0]: (x, y) for t in nodes for text, x, y in zip(t.hovertext, t.x, t.y, strict=True)}
    assert place == {"a": (0, 0), "b": (-0.5, -1), "c": (0.5, -1), "d": (0, -2)}
    edges = figure.data[0]
    assert edges.x.count(None) == 4  # a reads nothing; a -> d is implied by a -> b -> d


@pytest.mark.slow
def test_same_name_in_two_graphs() -> None:
    layer = nn.Linear(64, 64)

    def broken(x: Tensor) -> Tensor:
        h = layer(x)
        torch._dynamo.graph_break()
        return layer(h)

    report = explain(broken, torch.randn(8, 64), config=ALWAYS)
    assert len(set(report.keys)) == len(report.to_networkx()) == len(report.sites) == 2
    assert sum(len(t.x) for t in site_graph(report).data if t.name != "edges") == 2


def test_roofline(small: Report) -> None:
    products = [p for s in small.sites for p in s.products.values()]
    for roofs, heights, lines in (
        ({}, [p.flops_exact for p in products], 0),
        ({"float32": Roof(40, 8)}, [min(40, 8 * p.flops_exact / p.bytes_exact) for p in products], 1),
        ({"bfloat16": Roof(40, 8)}, [p.flops_exact for p in products], 0),
    ):
        figure, what = roofline(small, roofs)
        points = [t for t in figure.data if t.mode == "markers"]
        assert sorted(y for t in points for y in t.y) == pytest.approx(sorted(heights))
        assert sorted(x for t in points for x in t.x) == pytest.approx(sorted(p.flops_exact / p.bytes_exact for p in products))
        assert len(figure.data) - len(points) == lines and (what == "FLOPs") == (lines == 0)


# --- in a browser ---


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: pip install playwright")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as p:
        if path is None and not Path(p.chromium.executable_path).exists():
            pytest.skip("no Chromium: install the system's package, or run `playwright install chromium`")
        found = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


def opened(browser: Any, path: Path, scheme: str = "light") -> tuple[Any, list[str]]:
    """Open the page; return it once its script has run, with all complaints and requests of the browser."""
    page = browser.new_page(color_scheme=scheme, offline=True)
    page.set_default_timeout(60_000)
    wrong: list[str] = []
    page.on("console", lambda m: wrong.append(f"{m.type}: {m.text}"))
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.on("dialog", lambda d: (wrong.append(f"dialog: {d.message}"), d.dismiss()))
    page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith((path.as_uri(), "blob:", "data:")) else None)
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]")
    return page, wrong


def drawn(page: Any, name: str) -> Any:
    page.locator(f"#{name}").scroll_into_view_if_needed()
    page.wait_for_selector(f"#{name}.js-plotly-plot .main-svg")
    return page.locator(f"#{name}")


def column(page: Any, index: int) -> list[str]:
    return page.locator(f"#site-table tbody tr td:nth-child({index})").all_inner_texts()


def becomes(page: Any, number: int, expected: list[str]) -> bool:
    """Return whether a column soon has these texts; the browser answers a click with a delay."""
    for _ in range(100):
        if column(page, number) == expected:
            return True
        page.wait_for_timeout(50)
    return False


def test_browser_opens_sorts_and_draws(small: Report, tmp_path: Path, browser: Any) -> None:
    flops = (9_000, 10_000_000, 2_500_000, 800)  # as they are written, 9k, 10M, 2.5M and 800, they would be in another order
    sites = [replace(s, flops_exact=f) for s, f in zip(small.sites, flops, strict=True)]
    report = replace(small, sites=[*sites[:3], replace(sites[3], name=EVIL, reason=Reason(EVIL))])
    report.to_html(tmp_path / "report.html", Peaks())
    page, wrong = opened(browser, tmp_path / "report.html")
    names = [s.name for s in report.sites]
    assert column(page, 2) == names
    for title, key in (("FLOPs before", "flops_exact"), ("site", "name")):
        ordered = sorted(report.sites, key=lambda s: getattr(s, key))
        header = page.locator("#site-table th", has_text=re.compile(f"^{title}$"))
        header.click()
        assert becomes(page, 2, [s.name for s in ordered]), title
        header.click()
        assert becomes(page, 2, [s.name for s in reversed(ordered)]), title
    page.get_by_role("searchbox").first.fill("onerror")
    assert becomes(page, 2, [EVIL])
    labels = drawn(page, "graph").locator(".scatterlayer .textpoint text").all_text_contents()
    assert sorted(label.strip() for label in labels) == sorted(names)
    assert drawn(page, "roofline").locator(".scatterlayer .points .point").count() == sum(len(s.products) for s in report.sites)
    assert drawn(page, "bars1").locator(".barlayer .point").count() == 2 * len(report.sites)
    assert wrong == []
    page.close()


def test_browser_dark_and_light(small: Report, tmp_path: Path, browser: Any) -> None:
    from playwright.sync_api import expect

    small.to_html(tmp_path / "report.html")
    page, wrong = opened(browser, tmp_path / "report.html", "dark")

    text = drawn(page, "graph").locator(".legendtext").first

    def brightness() -> list[int]:
        """Return the brightness of the page and of a plot's text, from 0 to 765."""
        found = [page.locator("body").evaluate("e => getComputedStyle(e).backgroundColor"), text.evaluate("e => getComputedStyle(e).fill")]
        return [sum(map(int, re.findall(r"\d+", color)[:3])) for color in found]

    ground, ink = brightness()
    assert ground < 200 and ink > 500
    before = text.evaluate("e => getComputedStyle(e).fill")
    page.emulate_media(color_scheme="light")
    expect(text).not_to_have_css("fill", before, timeout=60_000)
    ground, ink = brightness()
    assert ground > 700 and ink < 300
    assert wrong == []
    page.close()


def test_browser_hundreds_of_sites(small: Report, tmp_path: Path, browser: Any) -> None:
    report = many(small, 300)
    report.to_html(tmp_path / "report.html")
    page, wrong = opened(browser, tmp_path / "report.html")
    assert len(column(page, 2)) == 100  # a page of the table
    page.get_by_role("searchbox").first.fill("blocks.299.")
    assert becomes(page, 2, ["blocks.299.fc"])
    assert drawn(page, "graph").locator(".scatterlayer .points .point").count() >= 300
    assert page.evaluate("document.getElementById('graph').data.filter(t => t.name !== 'edges').map(t => t.x.length).reduce((a, b) => a + b)") == 300
    assert wrong == []
    page.close()
