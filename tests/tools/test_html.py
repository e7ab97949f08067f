"""The HTML report holds everything, loads nothing from elsewhere, and in a real browser it opens, sorts and draws."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from helpers.models import mlp
from torch import Tensor, nn

from approx_compile import Report, explain
from approx_compile.reasons import Reason
from approx_compile.tools.report import html
from approx_compile.tools.report.html import difference
from approx_compile.tools.report.plots import Roof, branches, rated_products, roofline, rows_over_steps, site_graph
from approx_compile.tools.report.report_text import flops_title, verdict
from approx_compile.tools.report.words import type_of, why

ALWAYS: dict[str, Any] = {"policy": "always", "ratio": 0.5, "group": 1}
SVG = "{http://www.w3.org/2000/svg}"
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


def place(element: ElementTree.Element) -> tuple[float, float]:
    """Return where an element of a figure is."""
    moved = re.match(r"translate\(([0-9.]+) ([0-9.]+)", element.get("transform", ""))
    x, y = moved.groups() if moved else (element.get("x", "nan"), element.get("y", "nan"))
    return float(x), float(y)


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
        if tag not in ("meta", "br", "wbr"):
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
def test_self_contained_with_every_site_product_and_the_verdict(small: Report, tmp_path: Path) -> None:
    page = written(small, tmp_path / "report.html")
    assert page.fetched == []
    for css in page.texts["style"]:
        assert not re.search(r"@import|url\(\s*['\"]?(?!data:)", css)
    cells = page.texts["td"]
    assert [cells.count(s.name) for s in small.sites] == [1 + len(s.products) for s in small.sites]
    assert all(why(s) in cells and type_of(s).replace("->", "→") in cells for s in small.sites)
    assert page.texts["p"][0] == " ".join(verdict(small)) and page.texts["p"][0].count(". ") == 1  # two sentences
    assert any("'nowhere' matches no site" in text for text in page.texts["p"])
    assert (tmp_path / "report.html").stat().st_size < 2_000_000
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<details open" not in text and "Graph of layers" in text
    html.write(small, tmp_path / "report.html", None)
    assert "Roofline" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_chain_has_no_drawing_and_the_stored_profile_gives_the_roof(tmp_path: Path) -> None:
    report = explain(mlp(64, 64, 64), torch.randn(8, 64), config=ALWAYS)
    assert not branches(report)
    report.to_html(tmp_path / "report.html")  # the tests have a profile of a machine
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Graph of layers" not in text and "Roofline" in text and "GB/s</text>" in text


def test_names_break_after_dots_and_underscores_only(small: Report, tmp_path: Path) -> None:
    report = replace(small, sites=[replace(small.sites[0], name="blocks.0.self_attn")])
    report.to_html(tmp_path / "report.html")
    assert 'data-search="blocks.0.self_attn">blocks.<wbr>0.<wbr>self_<wbr>attn</td>' in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_names_and_reasons_are_escaped(tmp_path: Path) -> None:
    model = nn.Sequential(OrderedDict([(EVIL, nn.Linear(64, 64)), ("b", nn.Linear(64, 64))]))
    report = explain(model, torch.randn(8, 64), config=ALWAYS | {"rules": [{"layers": "</script><b>", "ratio": 0.1}]})
    assert report.sites[0].name == EVIL and report.unmatched == ["</script><b>"]
    report.sites[1] = replace(report.sites[1], reason=Reason("</td><script>alert(2)</script>"))
    page = written(report, tmp_path / "report.html")
    assert EVIL in page.texts["td"] and page.fetched == [] and any("</script><b>" in text for text in page.texts["p"])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in text and "<script>alert" not in text and text.count("<script") == text.count("</script>")


@pytest.mark.slow
def test_cuts(tmp_path: Path, small_work_counts: None) -> None:
    report = explain(mlp(64, 256, 256, 10), torch.randn(32, 64), config={"grad": {"axis": "rows", "ratio": 0.25}})
    (cut,) = report.cuts
    page = written(report, tmp_path / "report.html")
    assert cut.decision == "rows" and "0.25 of the rows" in page.texts["td"] and cut.reason in page.texts["td"]
    on_rows = sum(any(p.decision == "rows" for p in s.products.values()) for s in report.sites)
    assert page.texts["td"].count("8 of 32 rows") == on_rows > 0


def test_advice_stands_beside_its_reason(tmp_path: Path, small_work_counts: None) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32))
    report = explain(model, torch.randn(32, 16))
    page = written(report, tmp_path / "report.html")
    assert "cross-sample" in report.advice() and "What you can do (cross-sample): GroupNorm" in str(report)
    assert sum("GroupNorm" in text for text in page.texts["details"]) == 2  # of the layer above and of the cut
    assert not any(text.startswith("What you can do") for text in page.texts["p"])
    assert any("docs/reference/reasons.md" in text for text in page.texts["p"]) and 'grad: {"axis": "rows", "batch_norm": "approximate"}' in page.texts["code"]


def test_rows_over_steps_in_the_default_mode(tmp_path: Path, small_work_counts: None) -> None:
    report = explain(mlp(64, 256, 256, 10), torch.randn(32, 64))
    page = written(report, tmp_path / "report.html")
    assert any("Nothing was trained yet" in text for text in page.texts["p"]) and any("as it was; rows are chosen" in text for text in page.texts["h3"])
    assert report.adaptive is not None
    report.adaptive = replace(report.adaptive, steps=60, rows={1: 0.5}, history={"whole backward pass": ((0, 1.0), (30, 0.5))})
    page = written(report, tmp_path / "report.html")
    assert "whole backward pass" in page.texts["text"] and "as many as needed, 50 % now" in page.texts["td"]
    many_lines = rows_over_steps({f"cut {i}": ((0, 1.0),) for i in range(11)}, 60)
    labels = [t for t in ElementTree.fromstring(many_lines).iter(f"{SVG}text") if (t.text or "").startswith("cut ")]
    assert many_lines.count("var(--series") == 8 and len(labels) == len({place(t)[1] for t in labels}) == 4


def test_replaced_gradients_and_schedules(tmp_path: Path) -> None:
    rules = [{"layers": "0", "output": "exact", "grad_weight": "zero"}, {"layers": "2", "steps": "100:", "ratio": 0.25}]
    report = explain(mlp(64, 64, 64), torch.randn(8, 64), config=ALWAYS | {"rules": rules})
    page = written(report, tmp_path / "report.html")
    assert sum("replaced (zero)" in cell for cell in page.texts["td"]) == page.texts["td"].count("replaced") == 1
    assert any(f"the first of {report.assignments} assignments" in text for text in page.texts["p"]) and report.assignments > 1
    assert [kind in site_graph(report) for kind in ("gradient replaced", "sampled", "backward on rows")] == [True, True, False]
    assert json.loads(json.dumps(report.to_dict()))["assignments"] == report.assignments


def test_nothing_found(tmp_path: Path) -> None:
    page = written(explain(torch.relu, torch.randn(4)), tmp_path / "report.html")
    assert any("No matrix product" in text for text in page.texts["p"])


@pytest.mark.slow
def test_times_are_shown_where_a_report_has_them(small: Report, tmp_path: Path) -> None:
    times = [(200.0, 50.0), (474_000.0, 232_000.0), (None, None), (5e6, 100.0)]
    timed = [replace(s, time_exact_us=a, time_sampled_us=b) for s, (a, b) in zip(small.sites, times, strict=True)]
    page = written(replace(small, sites=timed), tmp_path / "report.html")
    assert {"200 us → 50 us", "474 ms → 232 ms", "5 s → 100 us"} <= set(page.texts["td"]) and "time" in page.texts["th"]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    table = text[text.index('id="site-table"') : text.index("</table>")]
    assert table.count("<td") == len(timed) * table.count("<th ")
    assert "time" not in written(small, tmp_path / "without.html").texts["th"]


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
    drawn = ElementTree.fromstring(site_graph(small))
    titles = [t.text.splitlines()[0] for t in drawn.iter(f"{SVG}title") if "\n" in t.text]
    assert sorted(titles) == ["a", "b", "c", "d"] and branches(small)
    edges = [g for g in drawn.iter(f"{SVG}g") if g.get("class") == "edge"]
    assert len(edges) == 4  # a reads nothing; a -> d is implied by a -> b -> d
    assert site_graph(small) == site_graph(small) and not re.search(r"#[0-9a-f]{6}\b", re.sub(r'"#\w+"', "", site_graph(small)))  # every colour is a variable


def test_names_in_figures_are_text(small: Report) -> None:
    report = replace(small, sites=[replace(small.sites[0], name=f"$x_1$ {EVIL}"), replace(small.sites[1], reads=())])
    drawn = ElementTree.fromstring(site_graph(report))
    assert f"$x_1$ {EVIL}" in [t.text for t in drawn.iter(f"{SVG}text")]


@pytest.mark.slow
def test_same_name_in_two_graphs() -> None:
    layer = nn.Linear(64, 64)

    def broken(x: Tensor) -> Tensor:
        h = layer(x)
        torch._dynamo.graph_break()
        return layer(h)

    report = explain(broken, torch.randn(8, 64), config=ALWAYS)
    assert len(set(report.keys)) == len(report.to_networkx()) == len(report.sites) == 2
    assert site_graph(report).count("reads ") == 2


def test_roofline(small: Report) -> None:
    products = [p for s in small.sites for p in s.products.values()]
    assert roofline(small, {}) is None and roofline(small, {"bfloat16": Roof(40, 8)}) is None
    roofs = {"float32": Roof(40, 8)}
    found = roofline(small, roofs)
    assert found is not None and found[1] == "GFLOP/s at most"
    what, points = rated_products(small, roofs)
    assert [p.height for p in points] == pytest.approx([min(40, 8 * p.flops_exact / p.bytes_exact) for p in products])
    assert [p.intensity for p in points] == pytest.approx([p.flops_exact / p.bytes_exact for p in products])
    drawn = ElementTree.fromstring(found[0])
    assert sum("GFLOP/s at" in (t.text or "") for t in drawn.iter(f"{SVG}title")) == len(products)
    assert sum(g.get("class") == "roof" for g in drawn.iter(f"{SVG}g")) == 1
    marks = [place(u) for g in drawn.iter(f"{SVG}g") if g.get("class") == "mark" for u in g.iter(f"{SVG}use")]
    assert len(marks) == len(products) and all(0 <= x <= float(drawn.get("width", 0)) and 0 <= y <= float(drawn.get("height", 0)) for x, y in marks)
    timed = [replace(s, products={n: replace(p, time_exact_us=2.0) for n, p in s.products.items()}) for s in small.sites]
    what, points = rated_products(replace(small, sites=timed), roofs)
    assert what == "GFLOP/s, predicted" and [p.height for p in points] == pytest.approx([p.flops_exact / 2e3 for p in products])


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
    for title, key in ((flops_title(report).replace("->", "→"), "flops_exact"), ("layer", "name")):
        ordered = sorted(report.sites, key=lambda s: getattr(s, key))
        header = page.locator("#site-table th", has_text=re.compile(f"^{re.escape(title)}$"))
        header.click()
        assert becomes(page, 2, [s.name for s in ordered]), title
        header.click()
        assert becomes(page, 2, [s.name for s in reversed(ordered)]), title
    page.get_by_role("searchbox").first.fill("onerror")
    assert becomes(page, 2, [EVIL])
    assert page.locator("svg[aria-label='roofline'] .mark").count() >= sum(len(s.products) for s in report.sites)
    assert set(names) <= set(page.locator("svg[aria-label='graph of sites'] text").all_text_contents())
    assert wrong == []
    page.close()


@pytest.mark.parametrize("width", [1280, 480])
def test_browser_widths(small: Report, tmp_path: Path, browser: Any, width: int) -> None:
    """The page is no wider than the window; at 1280 pixels the table isn't either, so that no reason is cut off."""
    name, reason = "model.layers.{}.self_attention.query_key_value", Reason("a reason of many words " * 5)
    sites = [replace(s, name=name.format(i), reason=reason, reads=()) for i, s in enumerate(small.sites)]
    replace(small, sites=sites).to_html(tmp_path / "report.html", Peaks())
    page, wrong = opened(browser, tmp_path / "report.html")
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    if width == 1280:
        assert page.evaluate("document.getElementById('site-table').scrollWidth <= document.getElementById('site-table').parentElement.clientWidth")
    assert wrong == []
    page.close()


def test_browser_dark_and_light(small: Report, tmp_path: Path, browser: Any) -> None:
    from playwright.sync_api import expect

    small.to_html(tmp_path / "report.html")
    page, wrong = opened(browser, tmp_path / "report.html", "dark")
    text = page.locator("svg text").first

    def brightness() -> list[int]:
        """Return the brightness of the page and of a figure's text, from 0 to 765."""
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


@pytest.mark.slow
def test_browser_hundreds_of_sites(small: Report, tmp_path: Path, browser: Any) -> None:
    report = many(small, 300)
    report.to_html(tmp_path / "report.html")
    page, wrong = opened(browser, tmp_path / "report.html")
    assert len(column(page, 2)) == 100  # a page of the table
    page.get_by_role("searchbox").first.fill("blocks.299.")
    assert becomes(page, 2, ["blocks.299.fc"])
    assert wrong == []
    page.close()
