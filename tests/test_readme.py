"""The README: its figures stand in .github/results, where benches wrote them; it is short; what it links to is there."""
import re

from run_script import ROOT

README = (ROOT / "README.md").read_text()
RESULTS = {file.name: file.read_text() for file in sorted((ROOT / ".github/results").glob("*.md"))}


def test_figures_are_results():
    """Of the section Results and the first table's minutes: every number with a decimal point or a thousands' comma."""
    known = set(re.findall(r"\d[\d,]*(?:\.\d+)?", "\n".join(RESULTS.values())))
    section = re.search(r"^## Results\n(.*?)^## ", README, re.M | re.S)[1]
    figures = re.findall(r"(?<![\w.])\d+(?:,\d{3})*\.\d+(?![\w.])|(?<![\w.])\d+(?:,\d{3})+(?![\w.])", section)
    figures += re.findall(r"\| (\d+\.\d) min \|", README)
    versions = re.findall(r"(?:torch|ManiSkill|SAPIEN) (\S+\d)", section)
    assert len(figures) >= 20
    assert not {figure for figure in figures if figure not in known and figure not in versions}


def test_it_is_short_and_names_one_commit():
    """That of every table which bench_all.sh wrote, between two marks of its file."""
    assert len(README.split()) <= 2000
    commit, = set(re.findall(r"`([0-9a-f]{7})`", README))
    for name in RESULTS.keys() - {"earlier.md"}:
        block, = re.findall(r"^<!-- bench -->\n(.*?)^<!-- end -->", RESULTS[name], re.M | re.S)
        assert f"scripts of `{commit}`" in block and "|---" in block, name


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) >= 4
    assert not [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
    assert not re.findall(r"!\[\]", README), "a picture without a text for those who cannot see it"
