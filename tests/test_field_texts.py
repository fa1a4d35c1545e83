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
from tests.sampling import sampled
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
        ("[think]", "[/think]"),
        ("<analysis>", "</analysis>"),
        ("<reasoning_content>", "</reasoning_content>"),
        ("<thinking_process>", "</thinking_process>"),
        ("<longcat_think>", "</longcat_think>"),
        ("<chain-of-thought>", "</chain-of-thought>"),
        ("<|thinking|>", "<|/thinking|>"),
        ("<|think_start|>", "<|think_end|>"),
        ("<｜begin▁of▁thinking｜>", "<｜end▁of▁thinking｜>"),
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
        "[gMASK]<sop>",
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
        "A neon sign that blinks [think] above a bar, <analysis pending on a screen",
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
        f"Here's your enhanced image prompt — {GOOD}",
        f"Here's an enhanced prompt – {GOOD}",
        f"<prompt>{GOOD}</prompt>",
        f"<enhanced_prompt>\n{GOOD}\n</enhanced_prompt>",
        f"Sure! Here it is:\n<prompt>{GOOD}</prompt>\nEnjoy!",
        f"<changes>more light</changes>\n<final_prompt>{GOOD}</final_prompt>",
        f"<output>{GOOD}</output>",
        f"Enhanced Prompt - {GOOD}",
        f"Enhanced prompt\n\n{GOOD}",
        f"Output: {GOOD}",
        f"Answer: {GOOD}",
        f"Revised: {GOOD}",
        f"**Final answer:** {GOOD}",
        f"Based on your feedback, here is the revised prompt: {GOOD}",
        f"I've revised the prompt based on your feedback:\n\n{GOOD}",
        str({"prompt": GOOD}),
        "Here is the prompt: " + str({"prompt": GOOD, "notes": None}),
        f"\\boxed{{{GOOD}}}",
        f"$\\boxed{{\\text{{{GOOD}}}}}$",
        f"Prompt mejorado: {GOOD}",
        f"Verbesserter Prompt: {GOOD}",
        f"**Prompt amélioré :** {GOOD}",
        f"Hier ist der verbesserte Prompt:\n{GOOD}",
        f"改进后的提示词：{GOOD}",
        f"Улучшенный промпт: {GOOD}",
        f"Thank you for the feedback! Here is the updated prompt:\n\n{GOOD}",
        f"I've incorporated your feedback. Here is the revised prompt:\n\n{GOOD}",
        f"Here is a single, fluent paragraph:\n\n{GOOD}",
        f"The enhanced prompt is: {GOOD}",
        f"Prompt v2: {GOOD}",
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
        "## Enhanced Prompt",
        f"<prompt>{GOOD}</prompt>\n<prompt>{GOOD} At dusk.</prompt>",
        str({"prompt_1": GOOD, "prompt_2": GOOD}),
        "{'prompt': ",
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
        "Night scene:\nA keeper reads a letter.",
        "Three lights burn below:\na harbour at dusk.",
        "This is a photo of a description: a keeper",
        "A keeper reads the prompt: login, in green letters.",
        "Login prompt: green letters on a black screen.",
        "Login prompt - green letters on a black screen.",
        "Here is a keeper reading the prompt: login.",
        "Okay, says the keeper, and closes the door.",
        "I have a terminal with a prompt on it: login.",
        "A keeper writes a letter.\nI hope you come home, it says.",
        "A sign:\nWould you like some tea?",
        "A letter to the keeper: 'Answer: never', in red ink.",
        "A box labelled {'prompt'} stands in the rain.",
        "A monitor shows <prompt> in green letters.",
        "# 12 is painted on a red door.",
        "Here is a new version of the tower - taller, in ruins.",
        "This is a new version of Venice: canals of glass.",
        "Great! reads a banner over a crowd.",
        "Of course. The word is carved in stone above a gate.",
        "Scene 1:\nA keeper reads.\nScene 2:\nA storm.",
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
    "I'm afraid I can't help with that.",
    "I'm really sorry, but that's not something I can help with.",
    "Sorry, this request is against our policy.",
    "Your request was flagged by our content policy.",
    "This request cannot be fulfilled.",
    "We cannot process this request.",
    "I regret that I cannot create this image.",
    "I couldn't generate that.",
    "I can't help you create an image of a lighthouse keeper who reads a letter.",
    "I'm not comfortable enhancing this description of a keeper.",
    "I appreciate your request, but I'm unable to write a prompt about a keeper and a letter.",
    "Thank you for your message. Unfortunately, I won't be able to assist with this.",
    "I understand that you want a letter, but I have to decline.",
    "Your prompt has been rejected by the safety system.",
    "The prompt you provided goes against my guidelines.",
    "Unable to generate a prompt for this scene.",
    "I'm sorry.",
    "No, I can't do that.",
    "Désolé, je ne peux pas.",
    "Cette demande enfreint nos règles.",
    "Ich kann dabei leider nicht helfen.",
    "Leider kann ich diese Anfrage nicht bearbeiten.",
    "Lamento, mas não posso ajudar.",
    "Infelizmente, não posso criar isso.",
    "Mi dispiace, ma non posso aiutarti.",
    "Het spijt me, maar ik kan hier niet bij helpen.",
    "Przepraszam, ale nie mogę w tym pomóc.",
    "К сожалению, я не могу помочь с этим.",
    "Üzgünüm, bu konuda yardımcı olamam.",
    "很抱歉，我不能协助完成这个请求。",
    "すみませんが、そのリクエストにはお応えできません。",
    "죄송하지만 도와드릴 수 없습니다.",
    "عذرًا، لا أستطيع المساعدة في ذلك.",
    "Tyvärr kan jag inte hjälpa till med det.",
    "Maaf, saya tidak bisa membantu.",
    "I cannot and will not create this.",
    "I apologize for the inconvenience, but this falls outside what I can do.",
    "I'm just an AI and can't produce that.",
    "It is against my guidelines to create such an image.",
    "My guidelines prevent me from writing this.",
    "Request denied.",
    "I can't.",
    "I don't think I can help with this.",
    "This prompt contains content that violates our policy, so I can't enhance it.",
    "Ich bin nicht in der Lage, das zu schreiben.",
    "无法提供帮助。",
]


@pytest.mark.parametrize("refusal", REFUSALS)
async def test_a_refusal_is_no_prompt_and_is_said(refusal):
    made, writes = await run(refusal, judges=critic(5))
    assert (made.final_prompt, made.stop_reason) == (PROMPT, "failed")
    assert "refus" in made.warnings[0] and len(writes.calls) == 1


SEEN = "A wide shot, 35 mm, in cold blue light before sunrise, with fine grain and deep shadows."
SAID = [  # what a user wrote; prompts begin with it, or with something like it
    "I can't see the sea, says a keeper.",
    "Sorry, says the keeper, and closes the door.",
    "I'm sorry, I can't help you, says the doctor to the sailor.",
    "I'm sorry, but I love the storm, a girl writes on the wall.",
    "I cannot write any longer: my hand shakes over the paper.",
    "I won't go back to the harbour, whispers the boy.",
    "I couldn't draw the curtain; the lamp burned all night.",
    "Unfortunately, the bridge is gone: two riders at the river.",
    "We cannot continue up the stairs; the water follows us.",
    "I am unable to move, buried in red sand up to my chest.",
    "I must decline the crown, says a knight on his knees.",
    "The request is denied: a herald before the king.",
    "This request is stamped DECLINED, a form on an oak desk.",
    "A policy is pinned to the door of an insurance office.",
    "Your request was refused, says a letter in the rain.",
    "The prompt is blocked by ivy: an old stage prompter's box.",
    "I'm afraid I can't do that, says a red camera eye to the astronaut.",
    "I'm afraid of the dark forest behind our house.",
    "I regret nothing: a singer in black under one spotlight.",
    "Apologies hang from the trees on paper strips.",
    "No, I can't make it, says the climber on the ice wall.",
    "As an AI wakes, a robot opens its eyes in a dusty workshop.",
    "Access denied, in red letters on a steel door.",
    "We can't process grief, reads a banner over a crowd.",
    "I will not answer the phone, a woman in a red kitchen.",
    "Je ne peux pas voir la mer, dit un gardien.",
    "Désolé, dit le gardien, et il ferme la porte.",
    "Leider kann ich das Meer nicht sehen, sagt ein Wärter.",
    "Es tut mir leid, steht auf einem Zettel an der Tür.",
    "Lo siento, dice el guardián junto a la lámpara.",
    "Lamento no ver el mar, escribe una niña en la arena.",
    "Não posso ver o mar, diz o faroleiro.",
    "Non posso vedere il mare, dice il guardiano.",
    "Извините, говорит смотритель маяка и закрывает дверь.",
    "抱歉，看守人说，他关上了灯塔的门。",
    "我不能看见大海，灯塔看守人说。",
    "すみません、と灯台守が言い、扉を閉める。",
    "죄송합니다, 등대지기가 편지를 읽으며 말한다.",
    "My policy papers burn in a tin.",
    "Hello, I can't process this, reads a robot's screen.",
    "This image violates the frame: paint runs down the wall.",
    "Plage désolée au crépuscule.",
]


@pytest.mark.parametrize("original", SAID)
def test_a_prompt_that_begins_as_the_user_does_is_no_refusal(original):
    first, _, rest = original.rstrip(".。").partition(" ")
    joined = f"{first} {rest}; {SEEN}"
    for text in (f"{original} {SEEN}", f"{original}\n\n{SEEN}", original, joined):
        assert parse_prompt(text, original) == text
        assert parse_prompt(f"“{text}”", original) == text


SCENES = [
    "I stand at the rail and cannot see the shore. Fog swallows the bow, grey on grey.",
    "I can't help but stare at the storm: lightning over a black pier, long exposure.",
    "I can't stop the horse. Its mane flies across my face, motion blur, low sun.",
    "“I can't help you,” says a keeper in a wool coat; a sailor lowers his eyes. Two-shot.",
    "Unable to sleep, a woman in a linen shirt sits by the window in blue moonlight.",
    "Sorry-looking scarecrows lean in a flooded field at dusk, wide shot, muted greens.",
    "Content policy pages burn in a steel bin, macro, orange light on wet concrete.",
    "A clerk stamps a request DECLINED under a green lamp, close-up, shallow focus.",
    "This content sailor mends a net on a sunlit quay, medium shot, warm palette.",
    "The content of the chest spills out: coins, letters, a red ribbon. Top light.",
    "The image of a saint is blocked by smoke; candles glow in the foreground.",
    "We cannot see her face, only the lamp behind her hair, a rim of gold. Close shot.",
    "My apologies, reads a card beside a broken blue vase, still life, window light.",
    "As an artificial moon rises, divers climb from a turquoise pool, aerial view.",
    "No request reaches the tower: cut wires swing in the wind, telephoto, dusk.",
    "Thank you, says a note in red ink on a wet bench; the park behind is out of focus.",
]


@pytest.mark.parametrize("text", SCENES)
def test_a_prompt_with_a_refusing_word_is_no_refusal(text):
    assert parse_prompt(text) == text
    assert parse_prompt(text, PROMPT) == text


@pytest.mark.parametrize("refusal", REFUSALS[:6] + REFUSALS[17:26])
@pytest.mark.parametrize("original", [SAID[0], SAID[2], SAID[12]])
def test_a_refusal_of_a_prompt_that_sounds_like_one_is_a_refusal(refusal, original):
    with pytest.raises(RuntimeError, match="refused"):
        parse_prompt(refusal, original)


@pytest.mark.parametrize("start", ["I'm sorry, but I can't", "I am unable to", "We cannot"])
def test_a_refusal_that_talks_at_length_is_a_refusal(start):
    more = "A keeper who reads a letter may stand for a real person, and that would be wrong. " * 8
    with pytest.raises(RuntimeError, match="refused"):
        parse_prompt(f"{start} create an image prompt for this request. {more}", PROMPT)


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
        critique("70/100 (good)"),
        critique("70 points"),
        critique("70/100 points"),
        critique("7/10 – good"),
        critique("70 (solid)"),
        json.dumps({name: {"rating": 70, "comment": "clear"} for name in FIVE} | REST),
        json.dumps({name: {"score": 7, "out_of": 10} for name in FIVE} | REST),
        json.dumps({name: {"score": 70.0, "max_score": 100} for name in FIVE} | REST),
        json.dumps({"scores": [{"name": name, "score": 70} for name in FIVE]} | REST),
        json.dumps({"scores": [{"dimension": name.replace("_", " ").title(), "rating": "7/10"}
                               for name in FIVE]} | REST),
        json.dumps({"scores": [[name, 70] for name in FIVE]} | REST),
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
        critique(70, improvements=None),
        json.dumps(FIVE | {"critique": "as scripted"}),
        json.dumps({"scores": FIVE, "feedback": {"critique": "as scripted"}}),
    ],
)
async def test_a_critique_without_improvements_asks_for_none(answer):
    judges = FakeChat([answer])
    made, _ = await run(GOOD, judges=judges, max_iterations=1)
    assert (len(judges.calls), made.warnings, made.final_score.improvements) == (1, [], [])


def test_what_is_wrong_is_said_in_the_same_words_as_before():
    for answer, said in (
        ('{"completeness": 80, "improvements": null}', "improvements: Input should be"),
        ('{"completeness": 80}', "improvements: Field required"),
        (json.dumps({"scores": [{"name": "completeness", "score": 7}]}), "completeness: Field req"),
        (critique({"reason": "clear"}), "must be a number from 0 to 100, not 'None'"),
    ):
        with pytest.raises(ValueError, match=said):
            parse_critique(answer)


@pytest.mark.parametrize(
    "answer",
    [
        critique("85/0"),
        critique("70 - 80"),
        critique("70 or 80"),
        critique({"score": 85, "out_of": 37}),
        critique({"score": None, "out_of": 10}),
        json.dumps({"scores": [{"name": name, "score": 70} for name in list(FIVE)[:4]]} | REST),
        json.dumps({"scores": [["completeness", 70]] * 5} | REST),
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


@pytest.mark.parametrize("status, wording, known", sampled(
    [(*said, known) for said in WORDINGS for known in ([], ["json_object"])], 13))
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
