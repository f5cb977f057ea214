"""README and docs: their Python runs, their links lead somewhere, and their tables are true."""

import re
from pathlib import Path

import pytest

import torch_softmax_ext as tse
from torch_softmax_ext.testing import SPECS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.stem)
def test_python_blocks_run(page):
    """In order, in one namespace."""
    names = {}
    for block in blocks(page):
        exec(compile(block, page.name, "exec"), names)


@by_page
def test_links_lead_to_files(page):
    """And back-quoted paths of the repository exist."""
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"`((?:csrc|torch_softmax_ext|tests|benchmarks|tools|docs|examples)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path


def test_every_page_is_linked_from_the_readme():
    text = README.read_text()
    assert [p for p in PAGES[1:] if str(p.relative_to(ROOT)) not in text] == []


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 110


def test_the_readme_names_every_public_function_and_module():
    text = README.read_text()
    assert [n for n in tse.__all__ if f"`{n}`" not in text and n != "CrossEntropyMetrics"] == []


def test_the_feature_table_names_tests_that_exist():
    text = (ROOT / "docs" / "peers.md").read_text()
    table = text[text.index("<!-- features -->") : text.index("<!-- end of features -->")]
    rows = [[c.strip() for c in line.strip("|\n").split("|")] for line in table.splitlines()[3:]]
    assert len(rows) > 10
    for feature, ours, test, *_ in rows:
        if ours == "–":
            continue
        file, name = test.strip("`").split("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), feature


def test_the_support_matrix_is_true():
    """Every operator is in a row of the support matrix; each ✓ stands for tests that run over every spec."""
    text = (ROOT / "README.md").read_text()
    table = text[text.index("<!-- support matrix -->") : text.index("<!-- end of support matrix -->")]
    rows = {
        name: [c.strip() for c in r[1:]]
        for r in (x.strip("|\n").split("|") for x in table.splitlines()[3:])
        for name in re.findall(r"`(\w+)`", r[0])
    }
    assert set(rows) == {s.name for s in SPECS}
    header = [c.strip() for c in table.splitlines()[1].strip("|").split("|")][1:]
    for spec in SPECS:
        cells = dict(zip(header, rows[spec.name], strict=True))
        have = {str(d).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf") for d in spec.dtypes}
        assert set(cells.pop("dtypes").split(", ")) == have
        assert set(cells.values()) == {"✓"}
