"""Text generation: which tokens are the assistant's, packing, cutting, and what is chosen row by row."""

import json
import math
from typing import Any

import pytest
import torch

from orchestrator import predictor, processors
from orchestrator.errors import InputError
from orchestrator.tasks import chat, create, generation
from orchestrator.tasks.base import RowError
from orchestrator.tasks.generation import Generation, Prompts
from orchestrator.tasks.text_generation import IGNORED
from tests.fixtures.tiny_generation import CHATML, MARKED, decoder, tokenizer
from tests.unit import live

TEXTS = ["The capital of France is Paris.", "Hello, how are you today?", "User: Assistant: system user assistant", "你好 🙂"]
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": " Hi 🙂 "},
    {"role": "user", "content": "How are you?"},
]


def task(**fields) -> Any:
    return create({"name": "text-generation", **fields})


@pytest.fixture(scope="module")
def chatml():
    return tokenizer(TEXTS, template=CHATML)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return decoder(tmp_path_factory.mktemp("llama"), TEXTS)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return decoder(tmp_path_factory.mktemp("gpt2"), TEXTS, "gpt2", None)


def said(made, turns, answer):
    """What of a conversation counts, run by run."""
    found = chat.tokens(made, turns, answer)
    ids, runs, last = [*found.prompt, *found.answer], [], None
    for token, counts in zip(ids, found.said, strict=True):
        if counts:
            runs.append([token]) if not last else runs[-1].append(token)
        last = counts
    return [made.decode(run) for run in runs]


# ---- which tokens are the assistant's ------------------------------------------------------------------------
@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["by its beginnings", "by its marks"])
def test_the_assistants_tokens_are_its_answers_and_their_ends(template):
    made = tokenizer(TEXTS, template=template)
    assert said(made, TALK, "Very well.") == [" Hi 🙂 <|im_end|>", "Very well.<|im_end|>"]
    found = chat.tokens(made, TALK, "Very well.")
    assert found.prompt == chat.tokens(made, TALK, None).prompt
    assert made.decode(found.prompt).endswith("<|im_start|>assistant\n")
    assert chat.ends(made) == [made.eos_token_id]


def test_both_ways_give_the_same_mask():
    masks = [chat.tokens(tokenizer(TEXTS, template=template), TALK, "Fine, and you?") for template in (CHATML, MARKED)]
    assert masks[0] == masks[1]


@pytest.mark.parametrize(
    ("template", "runs"),
    [
        # Contents are stripped, the end stands behind a space (Llama 2).
        ("{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content | trim }} </s>{% else %}[INST] {{ m.content | trim }} [/INST]{% endif %}{% endfor %}", [" Hi 🙂 </s>", " Fine. </s>"]),
        # Asked for an answer, it begins one otherwise than when it is given one (reasoning models).
        ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}", [" Hi 🙂 <|im_end|>", "Fine.<|im_end|>"]),
        # Writes something before the last answer only (Qwen 3).
        ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", [" Hi 🙂 <|im_end|>", "<think></think>Fine.<|im_end|>"]),
        # No end at all: the end of text is put there.
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}", [" Hi 🙂 ", "Fine.</s>"]),
    ],
    ids=["stripped", "asks otherwise", "before the last", "no end"],
)  # fmt: skip
def test_templates_of_every_kind_have_their_answers_found(template, runs):
    made = tokenizer(TEXTS)
    made.chat_template = template
    assert said(made, TALK, "Fine.") == runs
    assert chat.tokens(made, TALK, "Fine.").prompt == chat.tokens(made, TALK, None).prompt


def test_a_template_that_hides_or_refuses_is_a_sentence(chatml):
    made = tokenizer(TEXTS)
    made.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    with pytest.raises(InputError, match=r"does not write an assistant's answer as it is.*task\.chat_template"):
        chat.tokens(made, TALK, "Fine.")
    made.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    with pytest.raises(InputError, match="can't write a conversation of system, user, assistant, user: no system turn"):
        chat.tokens(made, TALK, "Fine.")


def test_a_tokenizer_without_a_template_gets_one_and_keeps_it(gpt2, tmp_path):
    made = processors.of(task(), gpt2)
    assert said(made, TALK, "Fine.") == [" Hi 🙂 </s>", "Fine.</s>"]
    text = made.decode(chat.tokens(made, TALK, "Fine.").prompt)
    assert text == "System:\nBe kind.\nUser:\nHello\nAssistant:\n Hi 🙂 </s>\nUser:\nHow are you?\nAssistant:\n"
    made.save_pretrained(tmp_path)
    assert processors.load(str(tmp_path), "text").chat_template == made.chat_template
    own = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    assert processors.of(task(chat_template=own), gpt2).chat_template == own


def test_tokens_are_shown_with_what_counts(chatml):
    row = task().clean({"messages": [*TALK, {"role": "assistant", "content": "Fine."}]})
    view = task().token_view(row, chatml)
    assert "".join(text for text, _ in view) == "".join(chatml.decode([token]) for token in task().encode([row], chatml)[0][0]["tokens"])
    assert "".join(text for text, counts in view if counts).endswith("Fine.<|im_end|>")
    only_last = [text for text, counts in task(answers="last").token_view(row, chatml) if counts]
    assert "".join(only_last) == "Fine.<|im_end|>"


# ---- rows ----------------------------------------------------------------------------------------------------
def test_every_form_becomes_the_same_conversation():
    forms = [
        {"messages": [{"role": "user", "content": "Add 1 and 2"}, {"role": "assistant", "content": "3"}]},
        {"messages": json.dumps([{"role": "user", "content": "Add 1 and 2"}, {"role": "assistant", "content": "3"}])},
        {"messages": [{"role": "user", "content": "Add 1 and 2"}], "completion": "3"},
        {"conversations": [{"from": "human", "value": "Add 1 and 2"}, {"from": "gpt", "value": "3"}]},
        {"prompt": "Add 1 and 2", "completion": "3"},
        {"prompt": [{"role": "user", "content": "Add 1 and 2"}], "completion": [{"role": "assistant", "content": "3"}]},
        {"instruction": "Add 1 and 2", "input": "", "output": "3"},
        {"instruction": "Add 1 and 2", "input": None, "output": 3, "text": "Below is an instruction …"},
    ]
    assert {json.dumps(task().clean(row), sort_keys=True) for row in forms} == {json.dumps(task().clean(forms[0]), sort_keys=True)}
    with_system = task().clean({"system": "Be exact.", "instruction": "Add", "input": "1 and 2", "output": "3"})
    assert with_system["messages"] == [{"role": "system", "content": "Be exact."}, {"role": "user", "content": "Add\n\n1 and 2"}]


def test_a_conversation_that_says_nothing_to_learn_is_a_bad_row():
    asked = task().clean({"messages": [{"role": "user", "content": "a"}]})
    with pytest.raises(RowError, match="'completion': expected an answer of the assistant at the end of the conversation, found 'user: a'"):
        task().check_target(asked)
    task().check_target(task().clean({"text": "a text"}))
    with pytest.raises(RowError, match=r"user and assistant to take turns.*found 'user, assistant, assistant'"):
        task().clean({"messages": [{"role": role, "content": "a"} for role in ("user", "assistant", "assistant")]})
    with pytest.raises(RowError, match=r"not empty in turn 2 \(assistant\), found ''"):
        task().clean({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]})


def test_what_the_rows_are_says_what_the_problem_is():
    talk, text = {"prompt": "a", "completion": "b"}, {"text": "c"}
    fitted = [task().fit({"train": task().observe([task().clean(row) for row in rows])}).problem for rows in ([talk], [text], [talk, text])]
    assert fitted == ["dialogue", "text", "dialogue"]
    assert task(problem="text").clean({**talk, **text}) == text
    assert task().rows_from("c") == [{"messages": [{"role": "user", "content": "c"}]}]
    assert task(problem="text").rows_from("c") == [text]
    with pytest.raises(InputError, match="no rows"):
        task().fit({"train": {"rows": 0}})


# ---- cutting -------------------------------------------------------------------------------------------------
def test_the_oldest_turns_of_a_long_conversation_are_left_out_and_counted(chatml):
    turns = [{"role": role, "content": f"turn {place} of this talk"} for place, role in enumerate(["user", "assistant"] * 4)]
    row = task().clean({"messages": [{"role": "system", "content": "Be kind."}, *turns]})
    limited = task(max_length=110, generate={"max_new_tokens": 20})
    [[whole]], [[cut]] = task(max_length=1000).encode([row], chatml), limited.encode([row], chatml)
    assert whole["truncated"] is False and cut["truncated"] is True and len(cut["input_ids"]) <= 90
    text = chatml.decode(cut["tokens"])
    assert text.startswith("<|im_start|>system") and "turn 7" in text and "turn 0" not in text
    [[short]] = task(max_length=16, generate={"max_new_tokens": 20}).encode([row], chatml)
    assert len(short["input_ids"]) == 8 and len(short["tokens"]) == 16 and short["truncated"] and short["generate"]["max_new_tokens"] == 8
    assert limited.encode([{"messages": row["messages"]}], chatml)[0][0]["input_ids"] == cut["input_ids"]


def test_no_more_of_a_long_conversation_is_left_out_than_must_be(chatml):
    turns = [{"role": role, "content": f"turn {place}"} for place, role in enumerate(["user", "assistant"] * 30 + ["user"])]
    for head in ([], [{"role": "system", "content": "Be kind."}]):
        row = {"messages": [*head, *turns]}
        for room in (24, 40, 60, 100):
            [[example]] = task(max_length=room + 4, generate={"max_new_tokens": 4}).encode([row], chatml)
            fitting = [
                ids for drop in range(0, len(turns), 2) if len(ids := chat.tokens(chatml, [*head, *turns[drop:]], None).prompt) <= room
            ]
            assert example["input_ids"] == (fitting[0] if fitting else chat.tokens(chatml, turns[-1:], None).prompt[-room:])


def test_a_tiny_temperature_draws_the_likeliest_token():
    scores = torch.tensor([1.0, 3.0, 2.0])
    for temperature in (1e-300, 1e-6):
        assert generation._drawn(scores, Generation(do_sample=True, temperature=temperature), 0.9) == 1


def test_a_long_text_is_learnt_whole_in_parts(gpt2):
    made = processors.of(task(), gpt2)
    text = "The capital of France is Paris. " * 20
    [parts] = task(problem="text", max_length=32, generate={"max_new_tokens": 8}).encode([{"text": text}], made)
    learnt = [label for part in parts for label in part["labels"] if label != IGNORED]
    assert [parts[0]["tokens"][0], *learnt] == [*made(text)["input_ids"], made.eos_token_id]
    assert [bool(part["input_ids"]) for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1]["input_ids"] == made(text)["input_ids"][-24:]


# ---- packing -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_is_unpacked_to_the_last_gradient(kind, llama, gpt2):
    base = {"llama": llama, "gpt2": gpt2}[kind]
    rows = [{"messages": [{"role": "user", "content": "Hello" * place}], "completion": "Fine " * (7 - place)} for place in range(1, 6)]
    found = []
    for packing in (False, True):
        one = task(packing=packing)
        made, model = processors.of(one, base), one.model(base, dtype=torch.float32)
        batch = one.collate([examples[0] for examples in one.encode(rows, made)], made)
        total, items = one.loss(model, batch)
        total.backward()
        found.append((total.item(), items, torch.cat([weight.grad.flatten() for weight in model.parameters()])))
        assert batch["input_ids"].shape[0] == (1 if packing else 5)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5) and found[0][1] == found[1][1]
    assert torch.allclose(found[0][2], found[1][2], atol=1e-4, rtol=1e-4)


def test_a_model_to_which_packed_texts_are_one_is_refused(llama, monkeypatch, tmp_path):
    from transformers import BloomConfig, LlamaForCausalLM

    BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=1).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"task\.packing: a 'bloom' model takes no positions"):
        task(packing=True).check_base(str(tmp_path))
    forward = LlamaForCausalLM.forward
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda self, position_ids=None, **rest: forward(self, **rest))
    from orchestrator.tasks import text_generation

    monkeypatch.setattr(text_generation, "_takes", lambda config: frozenset({"position_ids"}))
    with pytest.raises(InputError, match=r"LlamaForCausalLM lets texts .* see each other"):
        task(packing=True).model(llama, dtype=torch.float32)


# ---- generation ----------------------------------------------------------------------------------------------
PROMPTS = ["Hello", "The capital of France is", "How are you today? The capital of France", "你"]


def generated(base, settings, prompts=PROMPTS):
    made = processors.of(task(problem="text"), base)
    model = task(problem="text").model(base, dtype=torch.float32).eval()
    given = settings if isinstance(settings, list) else [settings] * len(prompts)
    with torch.inference_mode():
        return generation.generate(model, Prompts([made(prompt)["input_ids"] for prompt in prompts], given, made))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "settings",
    [
        Generation(max_new_tokens=20),
        Generation(max_new_tokens=20, repetition_penalty=1.5),
        Generation(max_new_tokens=20, do_sample=True, temperature=0.7, top_p=0.8, top_k=20, seed=5),
    ],
    ids=["greedy", "penalised", "drawn"],
)
def test_a_prompt_in_a_batch_gets_the_text_that_it_gets_alone(kind, settings, llama, gpt2):
    base = {"llama": llama, "gpt2": gpt2}[kind]
    together = generated(base, settings)
    for prompt, expected in zip(PROMPTS, together, strict=True):
        [alone] = generated(base, settings, [prompt])
        assert alone["ids"] == expected["ids"] and alone["text"] == expected["text"]
        assert generation.difference(alone, expected) < 1e-5


def test_greedy_is_what_the_library_generates(llama):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, made = AutoModelForCausalLM.from_pretrained(llama).eval(), AutoTokenizer.from_pretrained(llama)
    for prompt, found in zip(PROMPTS, generated(llama, Generation(max_new_tokens=12, repetition_penalty=1.2)), strict=True):
        inputs = made(prompt, return_tensors="pt")
        expected = model.generate(**inputs, max_new_tokens=12, do_sample=False, repetition_penalty=1.2)[0, inputs["input_ids"].shape[1] :]
        assert found["ids"] == expected.tolist()
        assert found["text"] == made.decode(expected, skip_special_tokens=True)


def test_rows_of_one_batch_have_settings_of_their_own(llama):
    settings = [
        Generation(max_new_tokens=3),
        Generation(max_new_tokens=9, do_sample=True, seed=1),
        Generation(max_new_tokens=9, do_sample=True, seed=2),
        Generation(max_new_tokens=9),
    ]
    found = generated(llama, settings, ["Hello"] * 4)
    assert len(found[0]["ids"]) == 3
    assert found[0]["ids"] == found[3]["ids"][:3]
    assert found[1]["ids"] != found[2]["ids"]
    assert found[0]["finish_reason"] == "length" and math.isclose(sum(math.exp(p) <= 1 for p in found[3]["logprobs"]), len(found[3]["ids"]))


def test_a_text_ends_before_a_stop_and_at_the_end_token(llama):
    [free] = generated(llama, Generation(max_new_tokens=12), ["Hello"])
    stop = next(piece for piece in free["pieces"][3:] if piece.strip() and "\ufffd" not in piece)
    [stopped] = generated(llama, Generation(max_new_tokens=12, stop=stop), ["Hello"])
    assert stopped["finish_reason"] == "stop_sequence"
    assert stopped["text"] == free["text"][: free["text"].index(stop)] and len(stopped["ids"]) <= len(free["ids"])
    made = processors.of(task(problem="text"), llama)
    model = task(problem="text").model(llama, dtype=torch.float32).eval()
    with torch.inference_mode():
        [ended] = generation.generate(model, Prompts([made("Hello")["input_ids"]], [Generation(max_new_tokens=12)], made, [free["ids"][4]]))
    first = free["ids"].index(free["ids"][4])
    assert ended["finish_reason"] == "eos_token" and ended["ids"] == free["ids"][: first + 1]


def test_long_and_short_rows_never_need_more_positions_than_there_are(gpt2):
    settings = [Generation(max_new_tokens=8), Generation(max_new_tokens=120)]
    found = generated(gpt2, settings, ["Hello " * 19, "Hi"])
    assert [len(one["ids"]) for one in found] == [8, 120] or found[1]["finish_reason"] == "eos_token"


def test_draws_follow_their_probabilities():
    scores = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()
    at = [generation._drawn(scores, Generation(do_sample=True), point) for point in (0.0, 0.49, 0.51, 0.69, 0.71, 0.91, 0.999999)]
    assert at == [0, 0, 1, 1, 2, 3, 3]
    assert generation._drawn(scores, Generation(do_sample=True, top_k=1), 0.99) == 0
    assert {generation._drawn(scores, Generation(do_sample=True, top_p=0.6), point / 100) for point in range(100)} == {0, 1}
    assert generation._drawn(scores, Generation(do_sample=True, temperature=0.01), 0.99) == 0


def test_texts_are_told_apart_by_what_the_model_said_where_they_part():
    def text(ids, *probabilities):
        return {"ids": ids, "logprobs": [math.log(p) for p in probabilities]}

    assert generation.difference(text([1, 2, 3], 0.9, 0.5, 0.9), text([1, 4, 5], 0.9, 0.499, 0.1)) == pytest.approx(0.0005)
    assert generation.difference(text([1, 2], 0.9, 0.9), text([1, 4], 0.9, 0.5)) == pytest.approx(0.2)
    assert generation.difference(text([1], 0.9), text([1, 2], 0.9, 0.9)) == math.inf
    drawn = [
        {**text([1, 2], 0.1, 0.2), "likeliest": [math.log(0.5), math.log(0.6)]},
        {**text([1, 3], 0.1, 0.01), "likeliest": [math.log(0.5), math.log(0.6)]},
    ]
    assert generation.difference(*drawn) == 0
    assert generation.difference(text([1, 2], 0.9, 0.9), text([3, 4], 0.9, 0.9), searched=True) == pytest.approx(0)


# ---- the model -----------------------------------------------------------------------------------------------
def test_lora_learns_and_checkpoints_gradients(llama):
    from orchestrator import models
    from orchestrator.config import ModelSection

    section = ModelSection.parse({"base": llama, "lora": {"r": 4}}, "model")
    model = models.load(task(), section, precision="fp32", seed=1)
    made = processors.of(task(), llama)
    batch = task().collate(
        [examples[0] for examples in task().encode([task().clean({"prompt": "Hello", "completion": "Fine."})], made)], made
    )
    model.base_model.model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        total, items = task().loss(model, batch)
        optimizer.zero_grad()
        (total / items).backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    with torch.inference_mode():
        [output] = task(generate={"max_new_tokens": 4}).infer(model, batch)
    assert len(output["ids"]) > 0


def test_a_tied_embedding_is_looked_up_in_full_precision(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, tie_word_embeddings=True)
    )
    predictor._cast_layers(model, torch.bfloat16)
    assert model.lm_head.weight.dtype is torch.bfloat16 and model.model.embed_tokens.weight.dtype is torch.float32
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight.bfloat16())


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_only_a_decoder_generates(kind, tmp_path):
    from transformers import AutoConfig

    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="does not generate texts from left to right"):
        task().check_base(str(tmp_path))


def test_more_tokens_than_positions_are_refused(llama):
    with pytest.raises(InputError, match=r"task\.max_length is 500, but the base model .* has only 128 positions"):
        task(max_length=500).check_base(llama)


# ---- scores and answers --------------------------------------------------------------------------------------
def test_scores_are_those_of_the_libraries():
    import sacrebleu
    from rouge_score import rouge_scorer

    expected = ["the cat sat on the mat", "a dog ran in the park today"]
    answers = ["the cat is on the mat", "a dog ran through a park today"]
    rows = [{"messages": [], "completion": text} for text in expected]
    predictions = [{"text": text, "finish_reason": "eos_token"} for text in answers]
    found = task().score(predictions, rows, ["bleu", "chrf", "rougeL", "exact_match", "ter"])
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(answers, [expected]).score / 100)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(answers, [expected]).score / 100)
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    pairs = [scorer.score(right, given)["rougeL"].fmeasure for given, right in zip(answers, expected, strict=True)]
    assert found["rougeL"] == pytest.approx(sum(pairs) / 2) and found["exact_match"] == 0.0
    assert task().score([], []) == {}
    assert task().of_loss(2.0) == {"perplexity": pytest.approx(math.exp(2.0))}
    chinese = task().score([{"text": "我 喜欢你们", "finish_reason": ""}], [{"messages": [], "completion": "我喜欢你"}], ["rouge1"])
    assert chinese["rouge1"] == pytest.approx(2 * 4 / 9)


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ({}, {}),
        ({"max_new_tokens": 3, "details": True}, {"max_new_tokens": 3}),
        ({"temperature": 0.5}, {"temperature": 0.5, "do_sample": True}),
        ({"temperature": 0, "do_sample": True}, {"do_sample": False}),
        ({"top_k": 3, "do_sample": False}, {"top_k": 3, "do_sample": False}),
        ({"stop_sequences": "x", "watermark": False}, {"stop": ["x"]}),
        ({"stop": ["a", "b"], "return_full_text": True}, {"stop": ["a", "b"], "return_full_text": True}),
    ],
)
def test_parameters_become_settings_of_the_row(given, settings):
    [row] = task().rows_from("Hi", task().parameters.parse(given))
    assert row.get("generate", {}) == settings


def test_requests_that_cannot_be_answered_are_sentences():
    with pytest.raises(InputError, match="ends with the assistant's turn; the last one must be the user's"):
        task().rows_from([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    with pytest.raises(InputError, match=r"`inputs\[1\]`: expected .* take turns"):
        task().rows_from(["a", [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]])
    with pytest.raises(InputError, match="unknown key 'grammar'"):
        task().parameters.parse({"grammar": {}}, "parameters")


def test_full_text_of_a_conversation_is_its_turns():
    [row] = task().rows_from("Hi", task().parameters.parse({"return_full_text": True}))
    output = {"text": " Hello ", "finish_reason": "eos_token", "ids": [1], "pieces": ["Hello"], "special": [False], "logprobs": [-0.5]}
    [entry] = task().answer([task().decode(row, [output])], task().parameters(), single=True)
    assert entry == {"generated_text": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    [entry] = task(problem="text").answer(
        [task().decode({"text": "Hi", "generate": {"return_full_text": True}}, [output])], task().parameters(), single=True
    )
    assert entry == {"generated_text": "Hi Hello "}


def test_the_hugging_face_client_gets_texts_and_details(llama, tmp_path, monkeypatch):
    """The real client, on the real application, with a real (tiny) model behind it."""
    one = task(problem="dialogue", generate={"max_new_tokens": 6})
    with live.endpoint(live.predictor(one, llama, tmp_path / "bundle")) as url:
        ask = live.client(url, monkeypatch)
        text = ask.text_generation("Hello")
        assert isinstance(text, str)
        detailed = ask.text_generation("Hello", details=True, max_new_tokens=4, temperature=0.8, seed=3)
        assert detailed.details.generated_tokens == len(detailed.details.tokens) <= 4
        assert detailed.details.finish_reason in ("length", "eos_token")
        assert ask.text_generation("Hello", return_full_text=True)[0] == {"role": "user", "content": "Hello"}
        with pytest.raises(Exception, match="take turns"):
            ask.text_generation([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])  # type: ignore[arg-type]
