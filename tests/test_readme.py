"""The README: its figures stand in .github/results, where benches wrote them; it is short; what it links to is there."""
import re

from run_script import ROOT

README = (ROOT / "README.md").read_text()
RESULTS = {file.name: file.read_text() for file in sorted((ROOT / ".github/results").glob("*.md"))}


def numbers(text: str) -> set:
    return set(re.findall(r"\d[\d,]*(?:\.\d+)?", text))


def figures(text: str) -> set:
    """The numbers with a decimal point or a thousands' comma, but for versions."""
    text = re.sub(r"(?:torch|ManiSkill|SAPIEN)\s[\d.]+\d", "", text)
    return set(re.findall(r"(?<![\w.])\d+(?:,\d{3})*\.\d+(?!\w|\.\d)|(?<![\w.])\d+(?:,\d{3})+(?!\w|\.\d)", text))


def test_figures_are_results():
    """Of Quickstart, Results and the first table's minutes: each stands in pipeline.md or in a file that its paragraph names."""
    section = "\n\n".join(re.findall(r"^## (?:Quickstart|Results)\n(.*?)(?=^## )", README, re.M | re.S))
    assert len(figures(section)) >= 20
    for paragraph in [*re.split(r"\n\n|^- ", section, flags=re.M), *re.findall(r"^\| \d .*\|(.*) min \|", README, re.M)]:
        sources = {"pipeline.md", *re.findall(r"\.github/results/(\w+\.md)", paragraph)}
        assert figures(paragraph) <= set.union(*(numbers(RESULTS[name]) for name in sources)), paragraph


def test_it_is_short_and_names_one_commit():
    """The commit of every table that bench_all.sh wrote, all on one machine."""
    assert len(README.split()) <= 2000
    commit, = set(re.findall(r"`([0-9a-f]{7})`", README))
    blocks = {name: re.findall(r"^<!-- bench -->\n(.*?)^<!-- end -->", text, re.M | re.S) for name, text in RESULTS.items()}
    assert [name for name, found in blocks.items() if len(found) != 1 or "|---" not in found[0]] == ["earlier.md"]
    machines = {re.search(r", on \d+ cores? of (.*):\n", *found)[1] for found in blocks.values() if found}
    assert len(machines) == 1 and f"; scripts of `{commit}`" in machines.pop()


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) >= 4
    assert not [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
    assert not re.findall(r"!\[\]", README), "a picture without a text for those who cannot see it"
