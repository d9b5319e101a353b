"""The page of a ranking, without a browser: complete, self-contained, harmless whatever the names are."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import math
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_entries import bounded, entry_lists, make_entry, metadata, non_finite, skipped

from kappa_fast.errors import MissingExtraError, OptionError, RankingFileError
from kappa_fast.report.page import render_page
from kappa_fast.results.entries import Skipped
from kappa_fast.results.ranking import Ranking
from kappa_fast.results.selection import Selection

HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    "{{ 7 * 7 }}{% raw %}",
    "'\"><svg onload=alert(1)>",
    "javascript:alert(1)",
    "]]>\u2028\u202e\ud800\x00",
]
NUMBERS = ("kappa", "lower", "upper", "score", "sensitivity")
NAMED = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Page(html.parser.HTMLParser):
    """What a parser finds: elements with their attributes, and the text of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.raw, self.words = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.raw.append([tag, dict(attrs), ""])

    def handle_data(self, data):
        if self.cdata_elem:
            self.raw[-1][2] += data
        else:
            self.words += f" {data}"

    @property
    def data(self):
        (text,) = (text for tag, attributes, text in self.raw if attributes.get("type") == "application/json")
        return json.loads(text)

    @property
    def script(self):
        (text,) = (text for tag, attributes, text in self.raw if tag == "script" and "type" not in attributes)
        return text

    @property
    def style(self):
        (text,) = (text for tag, _, text in self.raw if tag == "style")
        return text


def read_back(data):
    """The entries that the script of the page sees, as plain tuples."""
    columns, tables = data["entries"], data["tables"]
    rows = []
    for i, key in enumerate(columns["key"]):
        numbers = [(columns[name] or columns["kappa"])[i] for name in NUMBERS]
        numbers = [NAMED[value] if isinstance(value, str) else value for value in numbers]
        repeated = [tables[name][columns[name][i]] for name in ("group", "shape", "dtype", "method", "status")]
        others = (columns["layer"][i], bool(columns["certified"][i]), data["aliases"].get(str(i), []))
        rows.append((key, numbers, repeated, others))
    return rows


def expected(entry):
    repeated = [entry.group, [*entry.shape, entry.numel], entry.dtype, entry.method, entry.status]
    others = (entry.layer, entry.certified, list(entry.aliases))
    return entry.key, [getattr(entry, name) for name in NUMBERS], repeated, others


def same(a, b):
    return json.dumps(a) == json.dumps(b)  # nan equal to nan, floats by their bits


@given(entry_lists, st.lists(skipped, max_size=4), metadata)
def test_every_entry_and_every_skipped_parameter_is_in_the_page_bit_for_bit(entries, left_out, meta):
    ranking = Ranking(entries, left_out, meta)
    data = Page(render_page(ranking)).data
    assert same(read_back(data), [expected(entry) for entry in ranking])
    found = [
        (name, tuple(shape), reason[0] if reason else group["reason"])
        for group in data["skipped"]
        for name, shape, *reason in group["items"]
    ]
    assert sorted(found) == sorted((item.name, item.shape, item.reason) for item in left_out)


def hostile_ranking():
    entries = [
        make_entry(text, 2.0 + i, group=text, dtype=text, method=text, layer=i, aliases=(text,))
        for i, text in enumerate(HOSTILE)
    ]
    source = {"path": "/models/" + HOSTILE[0], "model_type": HOSTILE[3], "kind": HOSTILE[1]}
    meta = {"source": source, "versions": {"kappa_fast": HOSTILE[0]}, "device": HOSTILE, HOSTILE[0]: HOSTILE[0]}
    return Ranking(entries, [Skipped(text, (2, 3), text) for text in HOSTILE], {**meta, "seconds": 1.0})


def test_names_change_no_element_of_the_page():
    harmless = Ranking([make_entry("w", layer=0)], [Skipped("b", (2, 3), "tiny")], {"source": {"path": "a"}})
    plain, hostile = Page(render_page(harmless)), Page(render_page(hostile_ranking()))

    def tags(page):
        return {tag for tag, _ in page.elements}

    assert tags(hostile) == tags(plain)
    assert [tag for tag, _ in hostile.elements].count("script") == 2
    assert not any(name.startswith("on") for _, attributes in hostile.elements for name in attributes)
    assert hostile.script == plain.script
    assert read_back(hostile.data) == [expected(entry) for entry in hostile_ranking()]
    assert HOSTILE[0] in hostile.words  # as text
    assert "{{ 7 * 7 }}" in hostile.words
    assert "\u202e" not in render_page(hostile_ranking())


def test_nothing_in_the_page_leads_out_of_it():
    page = Page(render_page(hostile_ranking()))
    leading = ("src", "href", "srcset", "action", "data", "poster", "formaction", "background", "http-equiv")
    found = [(tag, name, value) for tag, attributes in page.elements for name, value in attributes.items()]
    assert [(tag, name, value) for tag, name, value in found if name in leading and tag != "meta"] == [
        ("link", "href", "data:,")
    ]
    assert re.findall(r"url\(|@import|@font-face", page.style) == []
    outward = (
        r"https?://|fetch\(|XMLHttpRequest|WebSocket|EventSource|sendBeacon|importScripts|\bimport\(|innerHTML|eval\("
    )
    assert re.findall(outward, page.script) == ["http://"]
    assert '"http://www.w3.org/2000/svg"' in page.script  # the name of a namespace, which nobody looks up


def test_the_policy_allows_the_one_style_and_the_one_script_and_nothing_else():
    page = Page(render_page(hostile_ranking()))
    (policy,) = (
        attributes["content"]
        for tag, attributes in page.elements
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )

    def digest(text):
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    assert dict(rule.strip().split(" ", 1) for rule in policy.split(";")) == {
        "default-src": "'none'",
        "style-src": digest(page.style),
        "script-src": digest(page.script),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    # Before anything that it is about, and no markup that would need more.
    assert [tag for tag, _ in page.elements].index("meta") < [tag for tag, _ in page.elements].index("style")
    assert not any("style" in attributes for _, attributes in page.elements)


def test_the_same_ranking_gives_the_same_bytes_in_another_process(tmp_path, run_python, root):
    ranking = hostile_ranking()
    ranking.to_html(tmp_path / "a.html")
    ranking.to_json(tmp_path / "ranking.json")
    code = "import kappa_fast; kappa_fast.Ranking.from_json('ranking.json').to_html('b.html')"
    run_python(code, cwd=tmp_path, env={"PYTHONPATH": str(root), "PYTHONHASHSEED": "7"})
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_the_head_says_what_was_ranked_and_how():
    usual = make_entry("layers.0.a", 20.0, layer=0, certified=True)
    quantized = make_entry("layers.0.b", 20.0, layer=0, certified=True)
    object.__setattr__(quantized, "quantization", "nf4")  # frozen, and not yet a field of every entry
    entries = [usual, quantized, make_entry("c", math.inf), non_finite("d")]
    meta = {
        "source": {"kind": "directory", "path": "/models/Llama-4", "model_type": "llama4"},
        "num_parameters": 1234567,
        "seconds": 12.345,
        "device": ["cuda:0"],
        "backend": "triton",
        "cache": {"hits": 3, "misses": 1},
        "settings": {"rtol": 0.01, "include": ["a", "b"], "top": None, "embeddings": True},
        "partial": True,
    }
    page = Page(render_page(Ranking([*entries, bounded("e", 50.0)], [Skipped("x", (1, 2), "tiny")], meta)))
    words = " ".join(page.words.split())
    for text in [
        *("Condition numbers of Llama-4", "Model type llama4", "Parameters 1,234,567", "Path /models/Llama-4"),
        "5 ranked, 2 proven, 1 rank deficient, 1 only bounded from below, 1 with NaN or inf, 1 skipped",
        *("kappa 20.00 to 20.00", "Quantized 1 nf4", "Computed in 12.3 s (cuda:0, triton)", "Cache hits: 3, misses: 1"),
        *("This ranking was interrupted", "settings.include a, b", "settings.top -", "settings.embeddings yes"),
    ]:
        assert text in words
    assert page.data["tables"]["quantization"] == [None, "nf4"]


@pytest.mark.parametrize("meta", [{}, {"source": "x", "seconds": "1", "versions": [1], "num_parameters": True}])
def test_a_page_needs_no_metadata(meta):
    page = Page(render_page(Ranking([], (), meta)))
    assert "Condition numbers of a model" in " ".join(page.words.split())
    assert page.data["parameters"] is None


def test_the_reference_implementations_file_can_be_shown(tmp_path):
    numbers = {"model.layers.0.q_proj.weight": 12.5, "lm_head.weight": math.inf, "x": math.nan}
    (tmp_path / "condition_numbers.json").write_text(json.dumps(numbers))
    data = Page(render_page(Ranking.from_json(tmp_path / "condition_numbers.json"))).data
    assert data["tables"]["shape"] == [[0, 0, 0]]
    assert data["tables"]["status"] == ["ok", "rank_deficient", "non_finite"]
    assert data["entries"]["layer"] == [0, None, None]


def test_a_selection_is_marked_by_positions():
    ranking = Ranking([make_entry(f"layers.{i}.w", 10.0 * (i + 1), layer=i) for i in range(4)])
    selection = ranking.select(num_tensors=3, unit="parameter").excluding(r"layers\.1")
    data = Page(render_page(ranking, selection)).data["selection"]
    assert (data["chosen"], data["certain"]) == ([0, 2], True)
    assert data["code"] == r"ranking.select(num_tensors=3, unit='parameter').excluding('layers\\.1')"
    assert eval(data["code"], {"ranking": ranking}) == selection
    assert Page(render_page(ranking)).data["selection"] is None


@pytest.mark.parametrize("budget", [dict(max_params=1.0), dict(top_p=1.0, per_group=True), dict(max_kappa=25.5)])
def test_the_code_of_a_selection_makes_the_same_selection(budget):
    ranking = Ranking([make_entry(f"layers.{i}.w", 10.0 * (i + 1)) for i in range(4)], (), {"num_parameters": 4 * 512})
    selection = ranking.select(**budget).including("norm", r"h\"\'")
    assert eval(Page(render_page(ranking, selection)).data["selection"]["code"], {"ranking": ranking}) == selection
    bare = Selection(selection.entries, True, {"source": "a notebook"})
    assert Page(render_page(ranking, bare)).data["selection"]["code"] == ""


def test_a_selection_of_another_ranking_is_refused(tmp_path):
    other = Ranking([make_entry("elsewhere.w")]).select(num_tensors=1)
    with pytest.raises(OptionError, match=r"holds 'elsewhere\.w', which is not in the ranking: select from"):
        Ranking([make_entry("w")]).to_html(tmp_path / "x.html", selection=other)
    assert not (tmp_path / "x.html").exists()


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(RankingFileError, match=r"cannot write .*nowhere.x\.html: No such file.*; choose a file"):
        Ranking([make_entry("w")]).to_html(tmp_path / "nowhere" / "x.html")


def test_an_old_page_stays_if_the_new_one_fails(tmp_path, monkeypatch):
    target = tmp_path / "x.html"
    target.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RankingFileError, match="No space left on device"):
        Ranking([make_entry("w")]).to_html(target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_extra_is_named_where_jinja2_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(
        MissingExtraError, match=r"to_html\(\) needs the package 'jinja2': pip install 'kappa_fast\[report\]"
    ):
        Ranking([make_entry("w")]).to_html(tmp_path / "x.html")
