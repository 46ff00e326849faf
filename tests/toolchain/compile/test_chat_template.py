"""Compiled chat templates against Hugging Face's own rendering and encoding."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from exporters.errors import ExportError
from runtime_py.bundle.chat_text import ChatText
from runtime_py.loop.dialogue import Turn
from runtime_py.loop.errors import BundleError
from tests import tiny
from toolchain.compile.chat_template import Template, TemplateText, compile_template, turns_of
from toolchain.compile.phone_text import phone_text

# As the families write them: what differs from one to the other, in our own words.
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<|im_start|>' + role + '\n' + m.content | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% set day = strftime_now('%d %b %Y') if strftime_now is defined else '?' %}"
    "{{ '<|im_start|>system\n\nToday Date: ' + day + '<|im_end|>' }}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>\n' + m.content }}{% else %}"
    "{{ '<s>\n' + m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
QWEN3 = (
    "{% set at = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set at.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% if loop.last and loop.index0 > at.last %}"
    "{{ '<think>\n\n</think>\n\n' + m.content.lstrip('\n') }}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GRANITE = (
    "{{ '<|im_start|>system\nOn ' + strftime_now('%B %-d, %Y') + '.<|im_end|>\n' }}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}{% else %}"
    "{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
FAMILIES = {
    "chatml": CHATML, "gemma": GEMMA, "llama2": LLAMA2, "llama3": LLAMA3, "phi3": PHI3,
    "qwen3": QWEN3, "granite": GRANITE, "plain": PLAIN,
}  # fmt: skip
SPECIAL = ("<|im_start|>", "<|im_end|>", "<s>", "</s>", "<think>")


def tokenizer() -> PreTrainedTokenizerFast:
    made = tiny.tokenizer_of()
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.add_tokens(["<think>", "</think>"])
    return made


def ends(own: PreTrainedTokenizerFast) -> tuple[int, ...]:
    return 2, int(own.convert_tokens_to_ids("<|im_end|>"))


def compiled(template: str, own: PreTrainedTokenizerFast) -> TemplateText:
    return compile_template(Template(own, template, "the template"), "the template")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[PreTrainedTokenizerFast, str, ChatText]:
    """Hugging Face's tokenizer, its template with the clock stopped, and ours."""
    own, template = tokenizer(), FAMILIES[request.param]
    found = phone_text(own, compiled(template, own), ends(own), len(own), "a test")
    day = "'July 26, 2024'" if request.param == "granite" else "'26 Jul 2024'"
    stopped = template.replace("strftime_now('%B %-d, %Y')", day)
    stopped = stopped.replace("strftime_now('%d %b %Y') if strftime_now is defined else '?'", day)
    return own, stopped, found.chat_text(512)


def messages(turns: tuple[Turn, ...]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


words = st.text(st.characters(exclude_categories=("Cs", "Cc")) | st.sampled_from("\n\t ab1"))
said = words.filter(lambda text: bool(text.strip()))


@given(contents=st.lists(said, min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_tokens_are_hugging_faces(family, contents: list[str]) -> None:
    """Of any text, with and without a reply prompt: its rendering encoded by its library."""
    own, template, text = family
    turns = turns_of([one.replace("think>", "") for one in contents])
    for reply in {False, len(turns) % 2 == 1}:
        expected = own.apply_chat_template(
            messages(turns), chat_template=template, add_generation_prompt=reply, tokenize=False
        )
        wanted = own(expected, add_special_tokens=False)["input_ids"]
        assert text.tokens(turns, reply).ids == wanted


hostile = st.sampled_from((*SPECIAL, "system", "\n", "hello ", "<|im_", "start|>"))


@given(parts=st.lists(hostile, min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_hostile_words_stay_words(family, parts: list[str]) -> None:
    """Hugging Face's own way to encode control tokens in a user's words as text is the oracle."""
    own, template, text = family
    turns = turns_of(["hello", "yes", "x" + "".join(parts) + "y"])
    expected = own.apply_chat_template(
        messages(turns),
        chat_template=template,
        add_generation_prompt=True,
        tokenize=True,
        sanitize_control_tokens=True,
        return_dict=False,
    )
    assert text.tokens(turns, reply=True).ids == expected
    controls = [index for index in text.tokens(turns, reply=True).ids if index >= 320]
    harmless = text.tokens(turns_of(["hello", "yes", "no"]), reply=True).ids
    think = set(own.convert_tokens_to_ids(["<think>", "</think>"]))
    assert [i for i in controls if i not in think] == [
        i for i in harmless if i >= 320 and i not in think
    ]


@pytest.mark.parametrize("token", ["<|im_end|>", "<s>"])
def test_a_runner_that_takes_text_gets_no_hostile_one(family, token: str) -> None:
    _, _, text = family
    harmless = turns_of(["hello < im_end >"])
    assert text.read_by_runner(text.for_runner(harmless)) == text.tokens(harmless, True).ids
    with pytest.raises(BundleError, match="holds the text of a special token"):
        text.for_runner(turns_of(["hello", "yes", f"a{token}b"]))


def test_what_is_learned_is_what_has_to_be_written(family) -> None:
    """After the reply prompt: the words, and what ends them, up to the first end token."""
    own, _, text = family
    turns = turns_of(["hello there", "the cat sat"])
    tokens = text.tokens(turns)
    prompt = text.tokens(turns[:1], reply=True).ids
    labels = [i for i, said in zip(tokens.ids, tokens.said, strict=True) if said == 1]
    first = tokens.said.index(1)
    assert first <= len(prompt)  # a token may begin in the prompt and end in the reply
    assert "the cat sat" in own.decode(labels)
    assert labels[-1] in ends(own)
    assert not set(labels[:-1]) & {*ends(own)}


def test_a_days_date_is_one_for_ever() -> None:
    own = tokenizer()
    assert compiled(LLAMA3, own).date == "2024-07-26"
    assert "Today Date: 26 Jul 2024" in compiled(LLAMA3, own).begin
    assert "On July 26, 2024." in compiled(GRANITE, own).begin
    assert compiled(CHATML, own).date is None


def test_a_date_in_an_unknown_form_is_refused() -> None:
    own = tokenizer()
    assert "2024-07-26" in compiled("{{ strftime_now('%F') }}" + CHATML, own).begin
    with pytest.raises(ExportError, match="asks for the date as %Q"):
        compiled("{{ strftime_now('%Q') }}" + CHATML, own)
    indented = "    {% if strftime_now is defined %}x{% endif %}" + CHATML
    assert compiled(indented, own).begin.startswith("x<|im_start|>")


def test_thoughts_are_shown() -> None:
    """The tokens that begin and end a thought are ordinary ones of the model's own file."""
    own = tokenizer()
    found = phone_text(own, compiled(QWEN3, own), ends(own), len(own), "a test")
    think = own.convert_tokens_to_ids(["<think>", "</think>"])
    assert found.facts.shown_ids == tuple(think)
    assert "special: <think>, </think>" in found.facts.rewritten
    ids = [think[0], *own("hm")["input_ids"], think[1], *own(" yes")["input_ids"], *ends(own)]
    assert found.chat_text(512).decode(ids) == "<think>hm</think> yes"


SPLITS = QWEN3.replace("m.content.lstrip('\n')", "m.content.split('</think>')[-1].lstrip('\n')")


def test_what_a_template_looks_for_is_said() -> None:
    assert compiled(SPLITS, tokenizer()).read == ("</think>", "<think>")
    assert compiled(QWEN3, tokenizer()).read == ()
    with pytest.raises(ExportError, match="cannot be compiled: for 2 exchanges"):
        compiled(SPLITS.replace("split('</think>')", "split('PS')"), tokenizer())


def test_an_end_that_no_reply_would_learn_is_refused() -> None:
    own = tokenizer()
    for template, words in (
        (CHATML, r"last words with <\|im_end\|>, and a reply ends with </s>"),
        (CHATML.replace("<|im_end|>", ""), "last words with no token"),
    ):
        with pytest.raises(ExportError, match=words):
            phone_text(own, compiled(template, own), (2,), len(own), "a test")
    with pytest.raises(ExportError, match=r"names 9999 .* which its tokenizer does not have"):
        phone_text(own, compiled(CHATML, own), (*ends(own), 9999), 10_000, "a test")


LATE = CHATML.replace("{% for m", "{% if messages | length > 4 %}late{% endif %}{% for m", 1)
FRIENDLY = CHATML.replace("m.content +", "(m.content + ('!' if 'x' in m.content else '')) +")
THINKS = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")


@pytest.mark.parametrize(
    "change",
    [
        *(f"|trim|replace({one!r}, '-')" for one in ("\r\n", "  ", "\t", "\u00a0", "\n\n")),
        ".split('</' ~ 'thought>')[-1]",
        "|replace(['/no' + '_think'][0], '')",
        "|replace('4', '') if m.content.isdigit() else m.content",
        "|lower if m.content.isupper() else m.content",
    ],
)
def test_words_that_a_template_changes_are_refused(change: str) -> None:
    """White space amid the words too, and what stands in the source in several parts."""
    with pytest.raises(ExportError, match="cannot be compiled: for"):
        compiled(CHATML.replace("m.content", f"(m.content{change})"), tokenizer())


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for %}", "cannot be rendered for 2 exchanges: .*--chat-template FILE"),
        ("{{ raise_exception('no') }}", "cannot be rendered for 2 exchanges: no"),
        ("{{ 1 + messages }}", "cannot be rendered"),
        ("{{ 1 // 0 }}", "cannot be rendered for 2 exchanges: .*zero"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "cannot be rendered"),
        (
            "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
            "cannot be rendered for 2 exchanges: .*recursion",
        ),
        (
            "{% if add_generation_prompt %}{{ raise_exception('not me') }}{% endif %}" + CHATML,
            "cannot be rendered for 2 exchanges and a reply prompt: not me",
        ),
        ("hello", "leaves out what user or assistant said"),
        (CHATML.replace("m.content", "m.content + m.content"), "repeats it"),
        (CHATML.replace("in messages", "in messages | reverse"), "changes the order"),
        (CHATML.replace("m.content", "m.content | upper"), "leaves out"),
        (CHATML.replace("m.content", "m.content[:20]"), "cannot be compiled"),
        (FRIENDLY, "cannot be compiled: for 1 exchange.* where its pieces give"),
        (LATE, "cannot be compiled: for 3 exchanges"),
        (CHATML.replace("m.content", "m.content | truncate(9999)"), "cannot be compiled"),
        (CHATML.replace("in messages", "in messages[-20:]"), "cannot be compiled"),
        (CHATML.replace("m.content", "m.content | replace('Be kind', 'be')"), "be compiled"),
        (THINKS, "begins a reply otherwise than it writes one"),
    ],
)
def test_what_no_pieces_express_is_refused(template: str, words: str) -> None:
    with pytest.raises(ExportError, match=words):
        compiled(template, tokenizer())


def test_a_template_of_another_vocabulary_is_refused() -> None:
    own = tokenizer()
    template = compiled(CHATML, own)
    start = own.convert_tokens_to_ids("<|im_start|>")
    with pytest.raises(ExportError, match=r"writes <\|im_start\|>, <\|im_end\|>, which the"):
        phone_text(own, template, ends(own), start, "a test")
