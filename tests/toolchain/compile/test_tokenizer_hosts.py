"""Tokenizers of all kinds: every host reads a text as Hugging Face's library does, or none does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pytorch_tokenizers import CppHFTokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from exporters.errors import ExportError
from runtime_py.bundle.chat_text import ChatText
from toolchain.compile.chat_template import Template, TemplateText, compile_template, turns_of
from toolchain.compile.phone_text import PhoneText, phone_text
from toolchain.compile.shipped_text import shipped_turns
from toolchain.compile.tokenizer_rewriting import candidates

BAR = "\u2581"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<s>[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' </s>' }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>\n' + m.content }}{% else %}"
    "{{ '<|assistant|>\n' + m.content }}{% endif %}{{ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + '\n' }}{% else %}"
    "{{ 'BOT: ' + m.content + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'BOT:' }}{% endif %}"
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def texts() -> list[str]:
    return [turn.content for turns in shipped_turns("calibration") for turn in turns]


def byte_level(
    normalizer: Any = None,
    split: str = "",
    digits: bool = False,
    ignore_merges: bool = False,
    also: Sequence[str] = (),
) -> Tokenizer:
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        made.normalizer = normalizer
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if split:
        steps.append(pre_tokenizers.Split(Regex(split), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([*texts(), *also], trainer)
    return made


def with_odd_space(normalizer: Any = None) -> Tokenizer:
    """With tokens of U+180E, white space to the runner's patterns alone, as large vocabularies."""
    return byte_level(normalizer, LLAMA3_SPLIT, also=["a \u180e. b"] * 3000)


def sentence_piece(**changes: Any) -> Tokenizer:
    """BPE with byte fallback, and ``changes`` of its JSON."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    bytes_ = [f"<0x{index:02X}>" for index in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    made.train_from_iterator(texts(), trainer)
    made.decoder = decoders.Sequence([
        decoders.Replace(BAR, " "), decoders.ByteFallback(), decoders.Fuse()
    ])  # fmt: skip
    raw = json.loads(made.to_str())
    raw["added_tokens"] = [t for t in raw["added_tokens"] if not t["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(raw | changes))


def metaspace(scheme: str, split: bool = False) -> Tokenizer:
    step = {"type": "Metaspace", "replacement": BAR, "prepend_scheme": scheme, "split": split}
    return sentence_piece(pre_tokenizer=step)


def prepend() -> Tokenizer:
    steps = [
        {"type": "Prepend", "prepend": BAR},
        {"type": "Replace", "pattern": {"String": " "}, "content": BAR},
    ]
    return sentence_piece(pre_tokenizer=None, normalizer={"type": "Sequence", "normalizers": steps})


def with_tokens(base: Tokenizer, *contents: str, **flags: bool) -> Tokenizer:
    raw = json.loads(base.to_str())
    first = base.get_vocab_size()
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    raw["added_tokens"] += [
        {"id": first + place, "content": content, **plain, **flags}
        for place, content in enumerate(contents)
    ]
    return Tokenizer.from_str(json.dumps(raw))


def gemma() -> Tokenizer:
    """Spaces become bars before a split that looks for spaces; runs of bars are added tokens, which
    the vocabulary has and builds by merges."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", BAR)
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    bytes_ = [f"<0x{index:02X}>" for index in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    made.train_from_iterator([*texts(), *["a" + " " * n + "b" for n in range(9)] * 900], trainer)
    raw = json.loads(made.to_str())
    raw["added_tokens"] = [t for t in raw["added_tokens"] if not t["content"].startswith("<0x")]
    model = raw["model"]
    runs = [BAR * n for n in range(2, 8)]
    for run in runs:  # each of one bar and a run that is one shorter
        if run not in model["vocab"]:
            model["vocab"][run] = len(model["vocab"])
            model["merges"].append([run[1:], BAR])
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    raw["added_tokens"] += [{"id": model["vocab"][run], "content": run, **plain} for run in runs]
    raw["decoder"] = {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": BAR}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"},
    ]}  # fmt: skip
    return Tokenizer.from_str(json.dumps(raw))


def phi3() -> Tokenizer:
    names = ("<|user|>", "<|assistant|>", "<|end|>")
    return with_tokens(prepend(), *names, rstrip=True, special=True)


BARS_LEFT = "runs of bars (U+2581) left to the vocabulary"
KINDS: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "byte-level": (byte_level, CHATML, ()),
    "NFC": (lambda: byte_level(normalizers.NFC(), QWEN_SPLIT), CHATML, ("NFC left to the host",)),
    "no NFC": (lambda: byte_level(split=QWEN_SPLIT), CHATML, ()),
    "ignore_merges": (lambda: byte_level(split=LLAMA3_SPLIT, ignore_merges=True), CHATML, ()),
    "odd space": (with_odd_space, CHATML, ("white space in patterns spelled out",)),
    "odd space and NFC": (
        lambda: with_odd_space(normalizers.NFC()), CHATML,
        ("NFC left to the host", "white space in patterns spelled out"),
    ),
    "digits": (lambda: byte_level(digits=True), CHATML, ()),
    "Metaspace first": (lambda: metaspace("first"), LLAMA2, ("Metaspace as Replace",)),
    "Metaspace always": (
        lambda: metaspace("always"), LLAMA2, ("Metaspace as Prepend and Replace",),
    ),
    "Metaspace never": (lambda: metaspace("never"), LLAMA2, ("Metaspace as Replace",)),
    "Metaspace split": (lambda: metaspace("first", True), LLAMA2, ("Metaspace as Replace",)),
    "Metaspace first, no token first": (
        lambda: metaspace("first"), PLAIN, ("Metaspace as Replace, its first space in the pieces",),
    ),
    "Prepend and Replace": (prepend, LLAMA2, ()),
    "runs of bars": (
        gemma, LLAMA2, ("no split at spaces, which are bars by then", BARS_LEFT),
    ),
    "rstrip": (
        phi3, PHI3,
        ("spaces around special tokens are the pieces' matter: <|user|>, <|assistant|>, <|end|>",),
    ),
    "added words": (lambda: with_tokens(byte_level(), "Zürich", "\n\n\n"), CHATML, ()),
}  # fmt: skip


def wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def template_of(own: PreTrainedTokenizerFast, template: str) -> TemplateText:
    return compile_template(Template(own, template, "it"), "it")


def ends(own: PreTrainedTokenizerFast) -> tuple[int, ...]:
    known = own.get_vocab()
    return tuple(known[end] for end in ("</s>", "<|im_end|>", "<|end|>") if end in known)


class Hosts:
    """A tokenizer as Hugging Face reads it by its own file, and as the bundle's two hosts do."""

    def __init__(self, backend: Tokenizer, template: str, folder: Path) -> None:
        self.own = wrapped(backend)
        self.template = template_of(self.own, template)
        size = len(self.own)
        self.found: PhoneText = phone_text(self.own, self.template, ends(self.own), size, "a test")
        self.text: ChatText = self.found.chat_text(512)
        (folder / "tokenizer.json").write_text(self.found.tokenizer)
        self.runner = CppHFTokenizer()
        self.runner.load(str(folder / "tokenizer.json"))

    def harmless(self, contents: Sequence[str]) -> bool:
        """No special token's text is in them: Hugging Face's library would obey it. No bar where
        the hosts read one by the vocabulary."""
        tokens = self.text.tokenizer.get_added_tokens_decoder().values()
        special = [str(token.content) for token in tokens if token.special]
        special += [BAR] * (BARS_LEFT in self.found.facts.rewritten)
        return not any(token in one for token in special for one in contents)

    def read(self, contents: Sequence[str]) -> list[list[int]]:
        turns = turns_of(contents)
        reply = len(turns) % 2 == 1
        rendered = self.template.write(turns, reply)
        return [
            self.own(rendered, add_special_tokens=False)["input_ids"],
            self.text.tokens(turns, reply).ids,
            list(self.runner.encode(self.text.render(turns, reply), 0, 0)),
        ]


@pytest.fixture(scope="module", params=KINDS)
def hosts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Hosts:
    make, template, rewritten = KINDS[request.param]
    made = Hosts(make(), template, tmp_path_factory.mktemp("hosts"))
    assert made.found.facts.rewritten == rewritten
    return made


any_text = st.text(st.characters(exclude_categories=("Cs", "Cc")) | st.sampled_from("\n\t  ab1'"))
contents = st.lists(any_text.filter(lambda one: bool(one.strip())), min_size=1, max_size=3)
relaxed = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


def read_alike(hosts: Hosts, said: list[str]) -> None:
    expected, ours, the_runners = hosts.read(said)
    assert ours == expected
    assert the_runners == expected


@given(said=contents)
@settings(max_examples=200, deadline=None, suppress_health_check=relaxed)
def test_all_hosts_read_alike(hosts: Hosts, said: list[str]) -> None:
    assume(hosts.harmless(said))
    read_alike(hosts, said)


@pytest.mark.full
@given(said=contents)
@settings(max_examples=10_000, deadline=None, suppress_health_check=relaxed)
def test_all_hosts_read_alike_10000(hosts: Hosts, said: list[str]) -> None:
    assume(hosts.harmless(said))
    read_alike(hosts, said)


@pytest.mark.parametrize("said", ["caf\u00e9", "Za\u017c\u00f3\u0142\u0107", "e\u0301", "\uac00"])
def test_accents_stay(hosts: Hosts, said: str) -> None:
    """What the runner's own NFC loses."""
    expected, ours, the_runners = hosts.read([said])
    assert ours == the_runners == expected
    assert said[0] in hosts.text.decode(ours) or hosts.found.facts.normalize == "NFC"


@pytest.mark.parametrize("space", ["\u180e", "\x85", "\u2003", "\u200b", "\u3000", "\ufeff"])
def test_white_space_that_libraries_differ_on(hosts: Hosts, space: str) -> None:
    for said in (f"a {space}. b", f"{space}{space}x", f"1 {space}\n{space}{space} 2"):
        read_alike(hosts, [said])


@pytest.mark.parametrize("hosts", ["runs of bars"], indirect=True)
def test_bars_that_are_said_are_the_same_to_all_hosts(hosts: Hosts) -> None:
    for said in ("\u2581", "a\u2581\u2581 b", f"{BAR * 5}x {BAR * 9}"):
        _, ours, the_runners = hosts.read([said])
        assert ours == the_runners
        assert said.replace(BAR, " ") in hosts.text.decode(ours)


def refused(backend: Tokenizer, template: str, words: str, vocab: int | None = None) -> None:
    own = wrapped(backend)
    with pytest.raises(ExportError, match=words):
        phone_text(own, template_of(own, template), ends(own), vocab or len(own), "a test")


def test_unigram_is_refused() -> None:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    names = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=900, special_tokens=names, unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(texts(), trainer)
    refused(made, LLAMA2, "cannot go on a phone: ExecuTorch's runner cannot read it")


@pytest.mark.parametrize("normalizer", [normalizers.Lowercase(), normalizers.NFKC()])
def test_another_normalizer_is_refused(normalizer: Any) -> None:
    refused(byte_level(normalizer), CHATML, "ExecuTorch's runner (cannot read it|reads)")


def test_spaces_as_two_characters_are_no_bars() -> None:
    made = Tokenizer.from_str(gemma().to_str().replace(BAR, "__"))
    tried = candidates(json.loads(made.to_str()), template_of(wrapped(made), LLAMA2), 2000)
    assert [one.apart for one in tried] == [""]


def test_words_that_eat_spaces_are_refused() -> None:
    """A token that is no special one, and may stand in what a user says."""
    made = with_tokens(byte_level(), "Zürich", lstrip=True)
    refused(made, CHATML, "ExecuTorch's runner reads .*Zürich.* as other tokens")


def test_added_tokens_without_an_embedding_are_dropped() -> None:
    """As the image token of Gemma 3's text models."""
    base = byte_level()
    size = base.get_vocab_size()
    own = wrapped(with_tokens(base, "<image>", special=True))
    found = phone_text(own, template_of(own, CHATML), ends(own), size, "a test")
    assert found.facts.rewritten == ("added tokens without an embedding dropped: <image>",)
    assert Tokenizer.from_str(found.tokenizer).token_to_id("<image>") is None
    ids = found.chat_text(512).tokens(turns_of(["see <image>"])).ids
    assert max(ids) < size
    refused(with_tokens(base, "<|user|>", special=True), PHI3, r"writes <\|user\|>", size)


def test_padding_and_truncation_of_whoever_saved_it() -> None:
    """As trainers leave them in the file; transformers sets both anew at every call."""
    base = byte_level()
    base.enable_padding(length=64)
    base.enable_truncation(8)
    own = wrapped(base)
    found = phone_text(own, template_of(own, CHATML), ends(own), len(own), "a test")
    assert found.facts.rewritten == ("padding and truncation dropped",)
    assert len(found.chat_text(512).tokens(turns_of(["the cat and the hat " * 9])).ids) > 20


def test_tokens_without_an_embedding_are_no_padding() -> None:
    base = byte_level()
    size = base.get_vocab_size()
    own = wrapped(with_tokens(base, "[PAD]", special=True))
    own.pad_token = "[PAD]"
    found = phone_text(own, template_of(own, CHATML), ends(own), size, "a test")
    assert found.facts.pad_id is None


def test_merges_that_build_a_special_token_are_refused() -> None:
    """What a user says would be obeyed, though nothing in it is a special token."""
    raw = json.loads(prepend().to_str())
    vocab = raw["model"]["vocab"]
    for token in ("<", "/", "s", ">", "</", "s>"):
        vocab.setdefault(token, len(vocab))
    raw["model"]["merges"] = [["<", "/"], ["s", ">"], ["</", "s>"], *raw["model"]["merges"]]
    refused(Tokenizer.from_str(json.dumps(raw)), LLAMA2, "'</s>' in what is said becomes")


def test_a_token_that_only_overlaps_the_template_is_no_control() -> None:
    hosts = with_tokens(byte_level(), "|>\n")
    own = wrapped(hosts)
    found = phone_text(own, template_of(own, CHATML), ends(own), len(own), "a test")
    assert found.facts.shown_ids == ()
