"""What language models and their servers answer in the field, and what becomes of it."""

from __future__ import annotations

import json

import pytest

from refimg import Pipeline, Scene, Story
from refimg.adapters import retry
from refimg.adapters.openai import OpenAIChat
from refimg.adapters.retry import ProviderError, RunLimits
from refimg.engine.protocols import Call
from refimg.enhance import (
    Critique,
    critic_messages,
    director_messages,
    enhance_prompt_iterative,
    parse_critique,
    parse_prompt,
    plain_text,
)
from tests.fakes import DIMENSIONS, FakeChat, FakeImages, FakeScorer, critic, critique
from tests.servers.llm import start_llm_server

PROMPT = "A lighthouse keeper reads a letter."
GOOD = "A lighthouse keeper reads a letter: a wide shot, lit by his lamp."
ASKED, JUDGED = director_messages(PROMPT), critic_messages(GOOD, PROMPT)


@pytest.fixture(scope="module")
def shared():
    with start_llm_server() as server:
        yield server


@pytest.fixture
def server(shared):
    shared.script()
    return shared


@pytest.fixture
def once(monkeypatch):
    """No call is tried again."""
    monkeypatch.setattr(retry, "_TRIES", 1)


def chat_with(server, model: str = "m") -> OpenAIChat:
    return OpenAIChat(model, base_url=server.base_url, api_key="key-of-this-test-0123456789")


async def failed(chat: OpenAIChat, messages=ASKED, **more):
    """The failure of a call that fails."""
    with pytest.raises(ProviderError) as caught:
        await chat.reply(messages, **more)
    return caught.value.failure


async def run(*answers: str, judges=None, **more):
    """An enhancement whose director gives these answers."""
    writes = FakeChat(list(answers))
    made = await enhance_prompt_iterative(
        PROMPT, director=writes, critic=judges or critic(90), **more
    )
    return made, writes


# --- reasoning and control tokens -----------------------------------------------------------


@pytest.mark.parametrize(
    "opening, closing",
    [
        ("<think>", "</think>"),
        ("<Thinking>", "</Thinking>"),
        ("<thought>", "</thought>"),
        ("<thoughts>", "</thoughts>"),
        ("<reasoning>", "</reasoning>"),
        ("<reflection>", "</reflection>"),
        ("<think effort='high'>", "</think >"),
        ("<seed:think>", "</seed:think>"),
        ("<mm:think>", "</mm:think>"),
        ("◁think▷", "◁/think▷"),
        ("[THINK]", "[/THINK]"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<|begin_of_thought|>", "<|end_of_thought|>"),
        ("<|inner_prefix|>", "<|inner_suffix|>"),
        ("<unused94>thought", "<unused95>"),
        ("<|channel>thought", "<channel|>"),
    ],
)
def test_reasoning_of_every_kind_is_cut(opening, closing):
    for text in (GOOD, critique(70)):
        assert plain_text(f"{opening}\nA wide shot? {{}}\n{closing}\n{text}") == text
        assert plain_text(f"A wide shot? {{}}\n{closing}\n\n{text}") == text
    assert plain_text(f"{opening}\nA wide shot, perhaps") == ""


@pytest.mark.parametrize(
    "answer",
    [
        f"<|channel|>analysis<|message|>A wide shot?<|end|><|start|>assistant<|channel|>final"
        f"<|message|>{GOOD}<|return|>",
        f"<|start|>assistant<|channel|>analysis<|message|>Hm.<|end|>\n<|start|>assistant<|channel|>"
        f"commentary<|message|>So.<|end|><|start|>assistant<|channel|>final <|constrain|>text"
        f"<|message|>{GOOD}",
        f"<|channel|>final<|message|>{GOOD}<|end|>",
        f"analysisThe user wants a wide shot.assistantfinal{GOOD}",
        f"analysis The user wants more.assistantcommentary So.assistantfinal {GOOD}",
    ],
)
def test_of_channels_only_the_final_one_counts(answer):
    assert plain_text(answer) == GOOD


@pytest.mark.parametrize(
    "answer",
    [
        "<|channel|>analysis<|message|>We need a prompt",
        "<|channel|>analysis<|message|>We need a prompt<|end|>",
        "<|start|>assistant<|channel|>analysis<|message|>We<|end|><|start|>assistant",
    ],
)
def test_an_analysis_alone_is_no_answer(answer):
    assert plain_text(answer) == ""


@pytest.mark.parametrize(
    "end",
    [
        "<|im_end|>",
        "</s>",
        "<|eot_id|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|end|>",
        "<|eom_id|>",
        "<end_of_turn>",
        "<eos>",
        "<｜end▁of▁sentence｜>",
        "<|return|>",
        "[EOS]",
        "<|END_OF_TURN_TOKEN|>",
        "<|END_RESPONSE|>",
        "<|im_end|>\n<|im_start|>user\nAnother, please",
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nMore!",
        "</s>[INST] More [/INST]",
    ],
)
def test_control_tokens_and_what_follows_the_end_are_cut(end):
    assert plain_text(f"{GOOD}{end}") == GOOD
    assert plain_text(f"{GOOD} {end}{end}\n") == GOOD


@pytest.mark.parametrize(
    "start",
    [
        "<|im_start|>assistant\n",
        "<s>",
        "<bos>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<start_of_turn>model\n",
        "<|assistant|>\n",
        "[/INST] ",
        "<|begin_of_text|>",
        "<｜Assistant｜>",
        "<|START_RESPONSE|>",
        "<answer>\n",
        "<|begin_of_solution|>",
        "<|im_end|>\n",
        "<think></think><answer>",
    ],
)
def test_control_tokens_before_the_answer_are_cut(start):
    assert plain_text(start + GOOD) == GOOD
    assert plain_text(f"{start}{GOOD}</answer>") == GOOD


@pytest.mark.parametrize(
    "text",
    [
        "A sign says <open>, another [CLOSED] | exit.",
        "Two birds, 3 < 4 and 5 > 2, <3 in red.",
        "A keeper thinks: I think, therefore I am.",
        "An analysis of light, finally <blue>.",
    ],
)
def test_what_only_looks_like_a_token_stays(text):
    assert parse_prompt(text) == text


# --- wrappers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        f"**Enhanced Prompt:** {GOOD}",
        f"**Enhanced Prompt**: {GOOD}",
        f"**Enhanced Prompt:**\n\n{GOOD}",
        f"Enhanced prompt: {GOOD}",
        f"Prompt: {GOOD}",
        f"### Final Enhanced Image Prompt\n\n{GOOD}",
        f"**Final Prompt (14 words)**\n{GOOD}",
        f"Sure! Here is the enhanced prompt:\n\n{GOOD}",
        f"Sure! Here's an improved version of your prompt: {GOOD}",
        f"Certainly! {GOOD}",
        f"Of course. Here is a richer prompt for you:\n**Prompt:** {GOOD}",
        f"Here’s the prompt, with your changes:\n{GOOD}",
        f"Okay, here is the revised prompt:\n\n> {GOOD}",
        f"Voici le prompt amélioré :\n\n{GOOD}",
        f"以下是增强后的提示词：\n{GOOD}",
        f"Here you are:\n```\n{GOOD}\n```\nLet me know if you want changes!",
        f"```text\n{GOOD}\n```",
        f"```json\n{json.dumps({'prompt': GOOD})}\n```",
        json.dumps({"prompt": GOOD}),
        json.dumps({"prompt": GOOD, "negative_prompt": "blur", "notes": "none"}),
        json.dumps({"enhanced_prompt": GOOD, "word_count": 14}),
        json.dumps({"text": GOOD}),
        json.dumps({"result": {"prompt": GOOD}}),
        f"Sure! Here is the prompt:\n{json.dumps({'prompt': GOOD})}\nEnjoy!",
        f'"{GOOD}"',
        f"“{GOOD}”",
        f"«{GOOD}»",
        f"`{GOOD}`",
        f"**{GOOD}**",
        f'**Prompt:** "{GOOD}"',
        f"> {GOOD}",
        f"{GOOD}\n\nLet me know if you would like changes.",
        f"{GOOD}\n\nI hope this helps!",
        f"{GOOD}\n\n---\n**Why this works:** it names the light.",
        f"{GOOD}\n\n(14 words)",
        f"{GOOD}\n\n**Negative prompt:** blur",
    ],
)
def test_of_a_wrapped_answer_the_prompt_alone_is_kept(answer):
    assert parse_prompt(answer) == GOOD


@pytest.mark.parametrize(
    "answer",
    [
        json.dumps({"subject": "a keeper", "light": "a lamp"}),
        json.dumps({"prompt": 3}),
        json.dumps({"prompt_1": GOOD, "prompt_2": GOOD}),
        json.dumps([GOOD, GOOD]),
        "{}",
        f"Option 1:\n```\n{GOOD}\n```\nOption 2:\n```\n{GOOD} At dusk.\n```",
        "Sure! Here is the enhanced prompt:",
        "**Enhanced Prompt:**",
    ],
)
async def test_what_holds_no_single_prompt_is_repaired(answer):
    made, writes = await run(answer, GOOD)
    assert (made.final_prompt, made.warnings, len(writes.calls)) == (GOOD, [], 2)


@pytest.mark.parametrize(
    "text",
    [
        'A sign reads "OPEN". Below, another: "CLOSED"',
        '"OPEN" says a sign, and below it, "CLOSED"',
        "Here a keeper reads: the letter is red.",
        "Here is a keeper who reads a letter: his hands shake.",
        "Great waves break below: a storm at dusk.",
        "A keeper.\n\nHe reads a letter.",
        "Sure-footed goats climb a cliff.",
        "Notes on a desk: a red letter.",
        "I see a keeper through the window, and I can't see his face.",
        "The prompt on a terminal reads: login.",
        "A book titled “Sorry, I can't” lies open.",
    ],
)
def test_a_prompt_that_is_not_wrapped_is_left_as_it_is(text):
    assert parse_prompt(text) == text


def test_what_the_user_wrote_is_no_wrapper():
    original = "An old man in a misty forest at 3 o'clock:"
    text = f"{original}\nA wide shot in soft light."
    assert parse_prompt(text, original) == text


async def test_a_negative_prompt_is_unwrapped_too():
    made, _ = await run(GOOD, "**Negative prompt:** blur, extra hands", negative=True)
    assert made.negative_prompt == "blur, extra hands"


# --- refusals and answers that run wild -----------------------------------------------------

REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I’m sorry, but I can’t assist with that request.",
    "I cannot create prompts that depict this.",
    "I apologize, but I'm unable to help.",
    "Sorry, I can't do that.",
    "As an AI language model, I cannot write this.",
    "Unfortunately, I am not able to continue.",
    "I must decline to write this prompt.",
    "I won't write this.",
    "**I'm sorry**, I can not do this.",
    "This request violates our content policy.",
    "Es tut mir leid, aber dabei kann ich nicht helfen.",
    "Je suis désolé, mais je ne peux pas vous aider.",
    "Lo siento, pero no puedo ayudar con eso.",
    "抱歉，我无法满足您的请求。",
    "申し訳ありませんが、お手伝いできません。",
    json.dumps({"prompt": "I'm sorry, but I can't help with that."}),
]


@pytest.mark.parametrize("refusal", REFUSALS)
async def test_a_refusal_is_no_prompt_and_is_said(refusal):
    made, writes = await run(refusal, judges=critic(5))
    assert (made.final_prompt, made.stop_reason) == (PROMPT, "failed")
    assert "refus" in made.warnings[0] and len(writes.calls) == 1


async def test_after_a_refusal_the_image_model_gets_the_prompt_and_its_markers():
    story = Story(scenes=[Scene(prompt=PROMPT)], consistency_markers={"style": "ink drawing"})
    images = FakeImages()
    pipeline = Pipeline(
        director=FakeChat(REFUSALS[:1]),
        critic=critic(5),
        image_model=images,
        scorers=[FakeScorer()],
        journal=None,
    )
    result = await pipeline.run(story)
    sent = {request.prompt for request in images.requests}
    assert sent and all(PROMPT in text and "ink drawing" in text for text in sent)
    assert not any("sorry" in text for text in sent)
    assert any("refus" in warning for warning in result.scenes[0].warnings)


async def test_a_later_refusal_keeps_the_best_so_far():
    made, _ = await run(GOOD, REFUSALS[0], judges=critic(60))
    assert (made.final_prompt, made.stop_reason) == (GOOD, "error")


async def test_an_answer_of_over_4000_characters_is_a_lost_iteration():
    made, writes = await run("a wide shot, " * 7000)
    assert (made.final_prompt, made.stop_reason, len(writes.calls)) == (PROMPT, "failed", 1)
    assert "iteration 1 lost" in made.warnings[0] and "4,000" in made.warnings[0]
    most = "a" * 4000
    assert parse_prompt(f"<think>{'b' * 9000}</think>{most}") == most


# --- JSON as models write it ----------------------------------------------------------------


def body(**over) -> dict:
    return json.loads(critique(70)) | over


FIVE = {name: body()[name] for name in DIMENSIONS}
REST = {"critique": "as scripted", "improvements": ["more"]}


@pytest.mark.parametrize(
    "answer",
    [
        critique(70).replace("as scripted", "as\nscripted\tand more"),
        critique(70).replace('"more"', '"more",').replace("]}", "],}"),
        json.dumps(body(), indent=2).replace("\n}", ",\n}"),
        critique(70, critique="one, } two, ] three,}").replace("]}", "],\n}"),
        json.dumps({"scores": FIVE, **REST}),
        json.dumps({"evaluation": {"scores": FIVE, **REST}}),
        json.dumps({"scores": FIVE, "feedback": REST}),
        json.dumps({name: {"score": 70, "reason": "clear"} for name in FIVE} | REST),
        json.dumps({"scores": {name: {"score": "70/100"} for name in FIVE}} | REST),
        critique("70/100"),
        critique("70 / 100"),
        critique("7/10"),
        critique("70%"),
        critique("70 out of 100"),
        critique("70.0"),
        critique(70, improvements="more"),
        critique(70, improvements="- more\n- and more"),
        f"{{draft: none}} {critique(70)}",
        f"{critique(10)}\n\nOn second thought:\n{critique(70)}",
        json.dumps({"draft": body(critique="x") | FIVE, "final": body()}),
        f"{critique(70)}\n{critique(10)[:-9]}",
        f'{critique(70)}\n{{"note": "done"}}',
    ],
)
async def test_json_is_read_with_patience_and_the_last_that_fits_counts(answer):
    judges = FakeChat([answer])
    made, _ = await run(GOOD, judges=judges, max_iterations=1)
    assert (len(judges.calls), made.warnings) == (1, [])
    assert made.final_score.overall == 70 and made.final_score.improvements[0] == "more"


@pytest.mark.parametrize(
    "answer",
    [
        critique("85/0"),
        critique("high/100"),
        critique("85/37"),
        critique("1/2/100"),
        critique(70, improvements=3),
        json.dumps({"scores": [70] * 5} | REST),
        critique(None),
        json.dumps({name: {"reason": "clear"} for name in FIVE} | REST),
        critique("nan/100"),
    ],
)
def test_patience_makes_nothing_up(answer):
    with pytest.raises(ValueError):
        parse_critique(answer)


def test_of_an_answer_without_measure_the_end_is_read():
    assert plain_text(f"<think>{'Hm. ' * 200_000}</think>{GOOD}") == GOOD


def test_half_a_million_commas_and_quotes_are_read_in_no_time():
    for text in ('{"a": [' + "1,]," * 500_000, '{"' + '\\"' * 500_000, "{,}" * 300_000):
        with pytest.raises(ValueError):
            parse_critique(text)


# --- what a server says of an answer --------------------------------------------------------


@pytest.mark.parametrize("reason", ["error", "abort", "ERROR"])
async def test_half_a_text_that_ends_in_an_error_is_asked_for_again(server, reason):
    server.script([{"fault": "ended", "reason": reason}])
    reply = await chat_with(server).reply(ASKED, call=Call(limits=RunLimits(40)))
    assert len(server.requests()) == 2 and reply.text.endswith("soft light.")


@pytest.mark.parametrize("reason", ["length", "max_tokens", "MAX_TOKENS", "content_filter"])
async def test_a_cut_answer_is_never_a_prompt(server, reason):
    server.script([{"fault": "ended", "reason": reason, "role": "director"}])
    chat = chat_with(server)
    made = await enhance_prompt_iterative(PROMPT, director=chat, critic=chat, max_iterations=1)
    assert (made.final_prompt, len(server.requests())) == (PROMPT, 1)


TOLD = [
    ({"code": 401, "message": "No auth"}, "down", False),
    ({"code": "402", "message": "Add credits"}, "down", False),
    ({"code": 429, "message": "Slow down, try again in 3s."}, "again", True),
    ({"code": "invalid_api_key", "message": "no"}, "down", False),
    ({"code": "insufficient_quota", "message": "no"}, "down", False),
    ({"code": None, "type": "rate_limit_exceeded", "message": "no"}, "again", True),
    ("Rate limit reached for this model", "again", True),
    ({"message": "Too Many Requests"}, "again", True),
    ("Incorrect API key provided", "down", False),
    ("Insufficient credits", "down", False),
    ({"code": 503, "message": "no model is free"}, "again", False),
    ({"code": 400, "message": "bad request"}, "never", False),
    ({"message": "something else"}, "again", False),
]


@pytest.mark.parametrize("told, kind, throttled", TOLD)
@pytest.mark.parametrize("where", ["body", "choice", "top"])
async def test_an_error_in_a_body_of_status_200_means_what_it_says(
    server, once, told, kind, throttled, where
):
    if where == "top" and not isinstance(told, dict):
        told = {"message": told}
    server.script([{"fault": "told", "error": told, "where": where}])
    failure = await failed(chat_with(server))
    assert (failure.kind, failure.throttled) == (kind, throttled)
    assert failure.wait == (3 if "3s" in str(told) else None)
    assert str(told["message"] if isinstance(told, dict) else told) in failure.text


async def test_after_a_bad_key_in_a_body_nobody_is_asked_again(server):
    server.script([{"fault": "told", "error": {"code": 401, "message": "No auth"}}])
    chat = chat_with(server)
    made = await enhance_prompt_iterative(PROMPT, director=chat, critic=chat)
    assert (made.stop_reason, len(server.requests())) == ("failed", 1)


PARTS = [
    [{"type": "text", "text": GOOD}],
    [{"type": "text", "text": GOOD[:20]}, {"type": "text", "text": GOOD[20:]}],
    [{"type": "output_text", "text": GOOD}],
    [
        {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
        {"type": "text", "text": GOOD},
    ],
    [{"type": "reasoning", "text": "Hm."}, {"type": "text", "text": GOOD}],
    [GOOD],
    {"type": "text", "text": GOOD},
]


@pytest.mark.parametrize("parts", PARTS)
async def test_the_texts_of_parts_are_one_answer(server, once, parts):
    server.script([{"fault": "content", "content": parts}])
    assert (await chat_with(server).reply(ASKED)).text == GOOD


@pytest.mark.parametrize(
    "parts, said",
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], "no text"),
        ([{"type": "refusal", "refusal": "I will not."}], "refused"),
        (7, "no text"),
    ],
)
async def test_parts_without_a_text_are_an_error(server, once, parts, said):
    server.script([{"fault": "content", "content": parts}])
    failure = await failed(chat_with(server))
    assert failure.kind == "never" and said in failure.text


@pytest.mark.parametrize(
    "usage",
    [
        "many",
        True,
        3,
        [],
        {},
        {"prompt_tokens": "100", "completion_tokens": 5},
        {"prompt_tokens": True, "completion_tokens": 5},
        {"prompt_tokens": 10**30, "completion_tokens": 5},
        {"prompt_tokens": 5, "completion_tokens": 10**30},
        {"prompt_tokens": -1, "completion_tokens": 5},
        {"prompt_tokens": 1.5, "completion_tokens": 5},
        {"prompt_tokens": {"total": 3}, "completion_tokens": [5]},
        {"prompt_tokens": None, "completion_tokens": 5},
        {"usage": {"prompt_tokens": 5, "completion_tokens": 5}},
    ],
)
async def test_a_usage_that_cannot_be_is_unknown(server, once, usage):
    server.script([{"fault": "usage", "usage": usage}])
    reply = await chat_with(server).reply(ASKED)
    assert reply.usage is None and reply.cost is None and PROMPT in reply.text


# --- the form of the answer -----------------------------------------------------------------

WORDINGS = [
    (400, "'response_format.type' must be 'text'"),
    (400, "Invalid input"),
    (400, "This model does not support structured outputs"),
    (400, "failed to parse grammar"),
    (404, "No endpoints found that support the requested parameters"),
    (422, "extra fields not permitted"),
    (500, "Internal Server Error"),
    (500, "grammar error: unexpected token"),
    (501, "Not implemented"),
    (200, "Unsupported parameter"),
]


@pytest.mark.parametrize("status, wording", WORDINGS)
@pytest.mark.parametrize("known", [["json_object"], []])
async def test_a_form_that_a_server_refuses_is_replaced_by_the_next(status, wording, known):
    more = {"refusal": (status, wording)}
    with start_llm_server(formats=known, **more) as server:
        for tried in (["json_schema", "json_object", None][: 3 - len(known)], None):
            server.script()
            chat = chat_with(server)
            made = await enhance_prompt_iterative(
                PROMPT, director=chat, critic=chat, max_iterations=1
            )
            forms = [
                seen["json"].get("response_format", {}).get("type")
                for seen in server.requests()
                if seen["role"] == "critic"
            ]
            assert (made.total_iterations, made.warnings) == (1, [])
            assert forms == (tried or [known[0] if known else None])


async def test_forms_that_fail_alike_are_tried_once_and_the_first_error_counts(once):
    with start_llm_server() as server:
        server.script(["400", "422", "500"])
        failure = await failed(chat_with(server), JUDGED, schema=Critique)
        assert failure.kind == "never" and "bad request" in failure.text
        assert len(server.requests()) == 3


async def test_a_server_that_is_ill_is_not_asked_in_every_form_at_each_attempt():
    with start_llm_server() as server:
        server.script(["500"] * 4)
        await chat_with(server).reply(JUDGED, Critique, call=Call(limits=RunLimits(40)))
        forms = [seen["json"].get("response_format", {}).get("type") for seen in server.requests()]
        assert forms == ["json_schema", "json_object", None, "json_schema", "json_schema"]


async def test_a_form_that_worked_is_kept_through_a_bad_moment():
    with start_llm_server() as server:
        await chat_with(server).reply(JUDGED, Critique)
        server.script(["500"])
        await chat_with(server).reply(JUDGED, Critique, call=Call(limits=RunLimits(40)))
        forms = [seen["json"]["response_format"]["type"] for seen in server.requests()]
        assert forms == ["json_schema", "json_schema"]
