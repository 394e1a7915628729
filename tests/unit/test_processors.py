from pathlib import Path

import pytest

from orchestrator import processors
from orchestrator.errors import InputError


def tokenizer(folder: Path, **special: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "[PAD]": 2, "good": 3}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", **special).save_pretrained(folder)


def test_a_tokenizer_keeps_its_padding_token(tmp_path: Path) -> None:
    tokenizer(tmp_path, pad_token="[PAD]", eos_token="</s>")
    found = processors.load(str(tmp_path), "text")
    assert found.pad_token == "[PAD]"
    assert found("good good")["input_ids"] == [3, 3]


def test_one_without_pads_with_the_end_of_text_and_saves_it(tmp_path: Path) -> None:
    tokenizer(tmp_path / "plain", eos_token="</s>")
    found = processors.load(str(tmp_path / "plain"), "text")
    assert found.pad_token_id == 1
    found.save_pretrained(tmp_path / "saved")
    assert processors.load(str(tmp_path / "saved"), "text").pad_token == "</s>"


def test_one_that_has_nothing_to_pad_with(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    with pytest.raises(InputError, match="neither a padding token nor an end-of-text token"):
        processors.load(str(tmp_path), "text")


def test_an_image_processor(tmp_path: Path) -> None:
    from transformers import ViTImageProcessor

    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    assert processors.load(str(tmp_path), "image").size["height"] == 8


def test_a_folder_without_a_processor_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match=f"'{tmp_path}' has no tokenizer: there is no .*tokenizer.json"):
        processors.load(str(tmp_path), "text")
    with pytest.raises(InputError, match="the image processor"):
        processors.load(str(tmp_path), "image")
