"""The README: its figures stand in .github/results, where benches wrote them; it is short; what it links to is there."""
import re

from run_script import ROOT

README = (ROOT / "README.md").read_text()


def test_figures_are_results():
    """Of the section Results and the first table's minutes: every number with a decimal point or a thousands' comma."""
    results = "\n".join(file.read_text() for file in sorted((ROOT / ".github/results").glob("*.md")))
    known = set(re.findall(r"\d[\d,]*(?:\.\d+)?", results))
    section = re.search(r"^## Results\n(.*?)^## ", README, re.M | re.S)[1]
    figures = re.findall(r"(?<![\w.])\d+(?:,\d{3})*\.\d+(?![\w.])|(?<![\w.])\d+(?:,\d{3})+(?![\w.])", section)
    figures += re.findall(r"\| (\d+\.\d) min \|", README)
    versions = re.findall(r"(?:torch|ManiSkill|SAPIEN) (\S+\d)", section)
    assert len(figures) >= 20
    assert not {figure for figure in figures if figure not in known and figure not in versions}


def test_it_is_short_and_names_one_commit():
    assert len(README.split()) <= 2000
    assert len(set(re.findall(r"`([0-9a-f]{7})`", README))) <= 1


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) >= 4
    assert not [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
    assert not re.findall(r"!\[\]", README), "a picture without a text for those who cannot see it"
