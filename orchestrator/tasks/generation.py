"""Generated texts: how tokens are chosen, when a text ends, and when two texts say the same.

The library's `generate` runs the model. What it chooses is decided here, row by row, so that each row of a batch has settings
of its own, and a row's text depends neither on the rows beside it nor on the padding.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from orchestrator.schema import Schema
from orchestrator.tasks.base import Prediction

if TYPE_CHECKING:
    import torch

PADDED_TOKENS = 16384
"""Tokens, padding and what is to come included, of the texts that are generated together: a bound on memory."""
CONTEXT = 8
"""Tokens before a generated one that say how it is written: some tokenizers leave out a space at the beginning of a text."""

Stops = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]


Found = tuple[list[int], list[float], list[float], str]
"""Tokens of a text, their log probabilities, those of the likeliest tokens at each place, and why it ended."""


class Generation(Schema):
    """How texts are generated."""

    max_new_tokens: Annotated[int, Field(gt=0)] = 128
    """Most tokens of an answer."""
    do_sample: bool = False
    """Draw each token by its probability; false: always the likeliest."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """do_sample: below 1 likely tokens become likelier still."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """do_sample: only the likeliest tokens that together have this probability (Holtzman et al. 2020)."""
    top_k: Annotated[int, Field(gt=0)] | None = None
    """do_sample: only so many of the likeliest tokens; None: all."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Above 1: tokens that have occurred become less likely (Keskar et al. 2019)."""
    stop: Stops = ()
    """Texts before which an answer ends."""
    seed: int = 0
    """do_sample: of what is drawn. The same seed, settings and prompt give the same text."""

    def with_(self, given: Mapping[str, Any] | None) -> Self:
        """These settings with those that are given; ones that are None are not given."""
        given = {name: value for name, value in (given or {}).items() if value is not None}
        return type(self).model_validate({**self.model_dump(), **given}) if given else self


class BeamGeneration(Generation):
    """How an encoder-decoder's texts are generated."""

    num_beams: Annotated[int, Field(gt=0, le=64)] | None = None
    """Texts kept while searching for the likeliest; 1: always the likeliest next token. None: as the base model says, else 1."""
    length_penalty: float | None = None
    """num_beams: above 0 longer texts are preferred. None: as the base model says, else 1."""
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] | None = None
    """So many tokens in a row never occur twice; 0: they may. None: as the base model says, else 0."""

    @model_validator(mode="after")
    def _draws_or_searches(self) -> Self:
        if self.do_sample and (self.num_beams or 1) > 1:
            raise ValueError("do_sample draws a text and num_beams searches for one; use one of them")
        return self


class Prompts:
    """What is to be generated of a batch. It goes with the batch's tensors, and so has their `to`."""

    def __init__(self, tokens: Sequence[Sequence[int]], settings: Sequence[Generation], tokenizer: Any, ends: Sequence[int] = ()):
        self.tokens, self.settings, self.tokenizer, self.ends = tokens, settings, tokenizer, tuple(ends)
        self.device: Any = "cpu"

    def to(self, device: Any, **_: Any) -> Prompts:
        self.device = device
        return self

    def of(self, places: Sequence[int]) -> Prompts:
        """Those at some places."""
        some = Prompts([self.tokens[place] for place in places], [self.settings[place] for place in places], self.tokenizer, self.ends)
        return some.to(self.device)


def generate(model: Any, prompts: Prompts) -> list[dict[str, Any]]:
    """For each prompt its text: `ids` (with the token that ended it), `pieces`, `special` and `logprobs` of each, `text`, `finish_reason`.

    Log probabilities are of the model's distribution, before temperature, top_k and top_p; `likeliest` has, where tokens are drawn,
    that of the likeliest one. `finish_reason`: eos_token,
    stop_sequence or length. `text` has no special tokens and ends before a stop sequence.
    """
    results: list[Any] = [None] * len(prompts.tokens)
    for places in _groups(prompts, model):
        some = [prompts.tokens[place] for place in places]
        settings = [prompts.settings[place] for place in places]
        run = _beams if _num_beams(model, settings[0]) > 1 else _step_by_step
        for place, (ids, logprobs, likeliest, reason) in zip(places, run(model, some, settings, prompts), strict=True):
            stops = prompts.settings[place].stop
            context = [] if model.config.is_encoder_decoder else prompts.tokens[place]
            results[place] = {
                "ids": ids,
                "logprobs": logprobs,
                **({"likeliest": likeliest} if prompts.settings[place].do_sample else {}),
                "pieces": pieces(prompts.tokenizer, ids),
                "special": [token in prompts.tokenizer.all_special_ids for token in ids],
                "text": _before_stop(_decoded(prompts.tokenizer, context, ids), stops),
                "finish_reason": reason,
            }
    return results


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text, special tokens by name."""
    return [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in ids]


def difference(one: Prediction, other: Prediction, *, searched: bool = False) -> float:
    """The mean difference between the probabilities that two texts' tokens had, up to the first token in which they differ.

    Rounding may turn a text in another direction where two tokens are almost equally likely, and all that follows is another text then.
    What the model said there can be compared all the same: at equal beginnings the likeliest token is as likely for both, whichever it is.
    Texts found by a search (`searched`) part where others were, on the whole, almost as likely: then it is the mean over the tokens that is
    compared. inf where one text only ends earlier.
    """
    mine, its = one.get("likeliest", one["logprobs"]), other.get("likeliest", other["logprobs"])
    same = next((place for place, (a, b) in enumerate(zip(one["ids"], other["ids"], strict=False)) if a != b), None)
    if same is None and len(one["ids"]) != len(other["ids"]):
        return math.inf
    compared = list(zip(mine, its, strict=False))[: None if same is None else same if searched else same + 1]
    if same is not None and searched:
        compared.append((sum(mine) / len(mine), sum(its) / len(its)))
    return sum(abs(math.exp(p) - math.exp(q)) for p, q in compared) / max(1, len(compared))


def details(prediction: Prediction) -> dict[str, Any]:
    """The `details` of an answer as text-generation-inference gives them."""
    names = {"id": "ids", "text": "pieces", "logprob": "logprobs", "special": "special", "likeliest": "likeliest"}
    columns = {name: prediction[key] for name, key in names.items() if key in prediction}
    return {
        "finish_reason": prediction["finish_reason"],
        "generated_tokens": len(prediction["ids"]),
        "prefill": [],
        "tokens": [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)],
    }


DETAILS_SCHEMA = {
    "type": "object",
    "properties": {
        "finish_reason": {"enum": ["eos_token", "stop_sequence", "length"]},
        "generated_tokens": {"type": "integer"},
        "prefill": {"type": "array"},
        "tokens": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "id": {"type": "integer"},
                    "text": {"type": "string"},
                    "logprob": {"type": "number"},
                    "special": {"type": "boolean"},
                    "likeliest": {"type": "number"},
                },
            },
        },
    },
}


def from_details(answer: Mapping[str, Any]) -> Prediction:
    """What `difference` compares, from an answer's `details`."""
    tokens = answer["details"]["tokens"]
    return {
        "ids": [token["id"] for token in tokens],
        "logprobs": [token["logprob"] for token in tokens],
        "likeliest": [token.get("likeliest", token["logprob"]) for token in tokens],
    }


# ---- the model -----------------------------------------------------------------------------------------------
def _groups(prompts: Prompts, model: Any) -> Iterator[list[int]]:
    """Places of prompts that go through the model together: of similar length and, for beams, of equal settings."""
    beams = [_num_beams(model, settings) for settings in prompts.settings]
    kinds: dict[Any, list[int]] = {}
    for place, settings in enumerate(prompts.settings):
        kinds.setdefault((beams[place], _shared(settings)), []).append(place)
    config = model.config.get_text_config(decoder=True)
    room = None if model.config.is_encoder_decoder else getattr(config, "max_position_embeddings", None)
    for places in kinds.values():
        group: list[int] = []
        longest = most = 0
        for place in sorted(places, key=lambda place: len(prompts.tokens[place])):
            length = max(longest, len(prompts.tokens[place])) + max(most, prompts.settings[place].max_new_tokens)
            # A row that has ended goes on beside the others, so together they must not need more positions than there are.
            if group and (length * beams[place] * (len(group) + 1) > PADDED_TOKENS or (room and length > room)):
                yield group
                group, longest, most = [], 0, 0
            group.append(place)
            longest, most = max(longest, len(prompts.tokens[place])), max(most, prompts.settings[place].max_new_tokens)
        yield group


def _shared(settings: Generation) -> Any:
    """The settings that the library takes for a whole batch; an encoder-decoder may be made to end at the last token."""
    names = ("num_beams", "length_penalty", "no_repeat_ngram_size", "max_new_tokens")
    return tuple(getattr(settings, name) for name in names) if isinstance(settings, BeamGeneration) else ()


def _num_beams(model: Any, settings: Generation) -> int:
    if not isinstance(settings, BeamGeneration) or settings.do_sample:
        return 1
    return settings.num_beams or model.generation_config.num_beams or 1


def _inputs(model: Any, tokens: Sequence[Sequence[int]], prompts: Prompts) -> dict[str, torch.Tensor]:
    """Padded on the left, where a decoder goes on at the right; an encoder's input on the right."""
    import torch

    longest, pad = max(map(len, tokens)), prompts.tokenizer.pad_token_id
    ids, mask = [], []
    for one in tokens:
        padding = [pad] * (longest - len(one))
        ids.append([*one, *padding] if model.config.is_encoder_decoder else [*padding, *one])
        mask.append([1] * len(one) + [0] * len(padding) if model.config.is_encoder_decoder else [0] * len(padding) + [1] * len(one))
    return {"input_ids": torch.tensor(ids, device=prompts.device), "attention_mask": torch.tensor(mask, device=prompts.device)}


def _config(model: Any, settings: Sequence[Generation], prompts: Prompts) -> tuple[Any, list[int]]:
    """The library's settings, in which nothing of the base model's own draws or penalises; and the tokens that end a text."""
    from transformers import GenerationConfig

    own: Any = model.generation_config.eos_token_id
    ends: list[int] = sorted({*prompts.ends, *([own] if isinstance(own, int) else own or [])})
    given = {name: value for name in ("length_penalty", "no_repeat_ngram_size") if (value := getattr(settings[0], name, None)) is not None}
    config = GenerationConfig(
        max_new_tokens=max(one.max_new_tokens for one in settings),
        max_length=None,
        num_beams=_num_beams(model, settings[0]),
        do_sample=False,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        use_cache=True,
        pad_token_id=prompts.tokenizer.pad_token_id,
        eos_token_id=ends or None,
        **given,
    )
    return config, ends


def _step_by_step(model: Any, tokens: Sequence[Sequence[int]], settings: Sequence[Generation], prompts: Prompts) -> Iterator[Found]:
    """The text of each prompt, chosen token by token."""
    from transformers import LogitsProcessorList, StoppingCriteriaList

    inputs = _inputs(model, tokens, prompts)
    config, ends = _config(model, settings, prompts)
    chooser = _chooser(tokens, settings, None if model.config.is_encoder_decoder else inputs["attention_mask"])
    ender = _ender(settings, ends, prompts.tokenizer, chooser)
    model.generate(
        **inputs,
        generation_config=config,
        logits_processor=LogitsProcessorList([chooser]),
        stopping_criteria=StoppingCriteriaList([ender]),
    )
    import torch

    ids, logprobs, likeliest = (torch.stack(values, 1).tolist() for values in (chooser.ids, chooser.logprobs, chooser.likeliest))
    for row, length in enumerate(ender.lengths):
        taken = length or len(ids[row])
        yield ids[row][:taken], logprobs[row][:taken], likeliest[row][:taken], ender.reasons[row] or "length"


def _chooser(tokens: Sequence[Sequence[int]], settings: Sequence[Generation], prompt_mask: Any) -> Any:
    """A `LogitsProcessor` that chooses each row's next token by the row's own settings, and leaves the library no other choice."""
    import torch
    from transformers import LogitsProcessor

    class Chooser(LogitsProcessor):
        def __init__(self) -> None:
            self.ids: list[torch.Tensor] = []
            self.logprobs: list[torch.Tensor] = []
            self.likeliest: list[torch.Tensor] = []
            self.draws = [
                random.Random(_draw_key(one.seed, ids)) if one.do_sample else None for one, ids in zip(settings, tokens, strict=True)
            ]
            penalties = [one.repetition_penalty for one in settings]
            self.penalty = torch.tensor(penalties)[:, None] if any(value != 1.0 for value in penalties) else None

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if self.penalty is not None:
                scores = self._penalised(input_ids, scores)
            logprobs = torch.log_softmax(scores.float(), dim=-1)
            likeliest, chosen = logprobs.max(-1)
            for row, draw in enumerate(self.draws):
                if draw is not None:
                    chosen[row] = _drawn(scores[row].float(), settings[row], draw.random())
            self.ids.append(chosen)
            self.likeliest.append(likeliest)
            self.logprobs.append(logprobs.gather(1, chosen[:, None])[:, 0])
            return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)

        def _penalised(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            assert self.penalty is not None
            if prompt_mask is not None:  # Padding is no token that has occurred.
                width = prompt_mask.shape[1]
                head = torch.where(prompt_mask.bool(), input_ids[:, :width], input_ids[:, width - 1 : width])
                input_ids = torch.cat([head, input_ids[:, width:]], 1)
            seen, penalty = scores.gather(1, input_ids), self.penalty.to(scores)
            return scores.scatter(1, input_ids, torch.where(seen < 0, seen * penalty, seen / penalty))

    return Chooser()


def _ender(settings: Sequence[Generation], ends: Sequence[int], tokenizer: Any, chooser: Any) -> Any:
    """A `StoppingCriteria` that ends each row by its own settings, and notes after how many tokens and why."""
    import torch
    from transformers import StoppingCriteria

    class Ender(StoppingCriteria):
        def __init__(self) -> None:
            self.lengths = [0] * len(settings)
            self.reasons = [""] * len(settings)

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            last = chooser.ids[-1].tolist()
            for row, one in enumerate(settings):
                if not self.lengths[row] and (reason := self._reason(row, last[row], one)):
                    self.lengths[row], self.reasons[row] = len(chooser.ids), reason
            return torch.tensor([bool(length) for length in self.lengths], device=input_ids.device)

        def _reason(self, row: int, last: int, one: Generation) -> str:
            if last in ends:
                return "eos_token"
            if one.stop:
                tail = [int(ids[row]) for ids in chooser.ids[-(max(map(len, one.stop)) + CONTEXT) :]]
                text = tokenizer.decode(tail, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                if any(stop in text for stop in one.stop):
                    return "stop_sequence"
            return "length" if len(chooser.ids) >= one.max_new_tokens else ""

    return Ender()


def _beams(model: Any, tokens: Sequence[Sequence[int]], settings: Sequence[Generation], prompts: Prompts) -> Iterator[Found]:
    """The same, by the library's beam search."""
    config, ends = _config(model, settings, prompts)
    config.return_dict_in_generate = config.output_scores = True
    found = model.generate(**_inputs(model, tokens, prompts), generation_config=config)
    scores = model.compute_transition_scores(found.sequences, found.scores, found.beam_indices, normalize_logits=False)
    start = found.sequences.shape[1] - scores.shape[1]
    for ids, logprobs in zip(found.sequences[:, start:].tolist(), scores.tolist(), strict=True):
        length = next((place + 1 for place, token in enumerate(ids) if token in ends), 0)
        taken = length or len(ids)
        found_at = [min(0.0, value) for value in logprobs[:taken]]  # The search's own arithmetic may round certainty up.
        yield ids[:taken], found_at, found_at, "eos_token" if length else "length"


def _draw_key(seed: int, prompt: Sequence[int]) -> int:
    """What is drawn for a prompt depends on it and on the seed, not on what else is in the batch."""
    return int.from_bytes(hashlib.blake2b(repr((seed, list(prompt))).encode(), digest_size=8).digest(), "little")


def _drawn(scores: torch.Tensor, settings: Generation, point: float) -> int:
    """The token at `point` (0 to 1) of the distribution that temperature, top_k and top_p leave."""
    import torch

    values, order = ((scores - scores.max()).double() / settings.temperature).sort(descending=True, stable=True)
    probabilities = values[: settings.top_k].softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = torch.where(before < settings.top_p, probabilities, 0.0)
    ends = probabilities.cumsum(-1)
    place = int(torch.searchsorted(ends, point * ends[-1], right=True))
    return int(order[min(place, int((probabilities > 0).sum()) - 1)])


def _decoded(tokenizer: Any, context: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids` as they stand behind `context`."""

    def text(tokens: Sequence[int]) -> str:
        return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    head = list(context[-CONTEXT:])
    whole, begin = text([*head, *ids]), text(head)
    return whole[len(begin) :] if begin and whole.startswith(begin) else text(ids)


def _before_stop(text: str, stops: Sequence[str]) -> str:
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]
