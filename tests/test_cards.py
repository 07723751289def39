"""The model cards in Markdown are those of the shipped networks, as the hub reads them."""

import json
import re
from pathlib import Path

import pytest
import yaml

from dgutils.errors import UserError
from dgutils.networks import checkpoints
from report import cards

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(path.stem for path in (ROOT / "dgutils/assets").glob("*.safetensors"))


def test_every_shipped_network_has_its_card_and_it_is_up_to_date():
    written = {f"docs/models/{path.name}": path.read_text("utf-8") for path in (ROOT / "docs/models").glob("*")}
    assert written == cards.pages(), "run: .venv/bin/python -m report.cards"
    assert {Path(path).stem for path in cards.pages()} == set(NAMES) != set()


@pytest.mark.parametrize("name", NAMES)
def test_the_hub_reads_its_metadata_and_a_person_what_matters(name):
    card = checkpoints.model_card(name)
    _, front, body = re.split("^---$", cards.markdown(card), maxsplit=2, flags=re.M)
    metadata = yaml.safe_load(front)
    assert metadata["license"] == "mit" and metadata["library_name"] == "dgutils"
    assert metadata["pipeline_tag"] in ("unconditional-image-generation", "image-classification")
    (result,) = metadata["model-index"][0]["results"]
    assert metadata["datasets"] == [result["dataset"]["type"]] and metadata["model-index"][0]["name"] == name
    assert sorted(metric["value"] for metric in result["metrics"]) == sorted(
        value for key, value in card["evaluation"].items() if key != "n")
    for key in ("sha256", "what", "licence", "torch"):
        assert card[key] in body
    assert f"| {card['parameters']:,} |" in body and f"On {card['evaluation']['n']:,} test images" in body
    recipe = yaml.safe_load(re.search("```yaml\n(.*?)```", body, re.S)[1])
    assert recipe == {key: value for key, value in card["recipe"].items() if key not in ("what", "licence")}
    space = {}
    exec(re.search("```python\n(.*?)```", body, re.S)[1], space)
    assert sum(value.numel() for value in space["network"].state_dict().values()) == card["parameters"]


def test_an_architecture_without_a_kind_of_card_is_named(tmp_path, monkeypatch):
    card = checkpoints.model_card(NAMES[0])
    card["recipe"]["architecture"] = "Transformer"
    (tmp_path / "new.json").write_text(json.dumps(card | {"name": "new"}))
    monkeypatch.setattr(cards, "ASSETS", tmp_path)
    with pytest.raises(UserError, match="no kind of card for the network new"):
        cards.pages()
