"""The rungs that are PyTorch on both sides: eager, captured, quantized."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from exporters.model.lora_tensors import set_adapter
from runtime_py.bundle.adapter_forms import to_runtime
from runtime_py.bundle.chat_text import ChatText
from runtime_py.bundle.peft_adapter import read_peft
from runtime_py.engine.streaming import StreamingEngine
from toolchain.compile.phone_text import compiled
from toolchain.compile.tokenizer_proof import AT_EXPORT, HuggingFaceReading
from toolchain.compile.tolerances import TABLE, of_block
from toolchain.compile.wide import Wide
from toolchain.verify.parity import probes, training_checks, weights_checks
from toolchain.verify.parity.cases import EFFECT, INITIAL
from toolchain.verify.parity.context import Context, outputs_of
from toolchain.verify.parity.lm_checks import Bounds, LmOutputs, compared
from toolchain.verify.parity.models import eager_embedding, eager_logits
from toolchain.verify.parity.run_bounds import largest_logit, of_floats
from toolchain.verify.parity.verdict import (
    Check,
    FirstDifference,
    Rung,
    compare,
    rung,
    stated,
    worst,
)
from toolchain.verify.peft_module import set_peft_adapter
from toolchain.verify.reference_engines import TransformerEngine


def eager(context: Context) -> Rung:
    """Hugging Face and PEFT themselves: that the bundle's text, tokens and adapter are theirs."""
    checks = _text(context)
    adapter, first = _adapter(context)
    checks += adapter
    outputs = _eager_outputs(context)
    for (name, on), logits in outputs.logits.items():
        largest = float(np.abs(logits).max())
        note = "" if np.isfinite(largest) else "NaN or infinite"
        checks.append(stated("lm", f"{on}, {name}", "logits are finite", not note, note))
    return rung("eager", "the source", checks, first)


def _text(context: Context) -> list[Check]:
    """The bundle's tokenizer and pieces are what an export would write now, and all hosts read by
    them what Hugging Face's library reads by the model's own."""
    bundle, expected = context.bundle, context.source.text
    checkpoint = context.source.source.checkpoint
    facts = bundle.manifest.tokenizer
    file = (bundle.path / facts.file).read_text(encoding="utf-8")
    checks = [_same("tokenizer.json", json.loads(file), json.loads(expected.tokenizer))]
    wanted = expected.facts.model_dump(mode="json")
    for name, value in facts.model_dump(mode="json").items():
        if name != "file":
            checks.append(_same(f"tokenizer: {name}", value, wanted[name]))
    reading = HuggingFaceReading(
        checkpoint.tokenizer.backend_tokenizer,
        compiled(checkpoint),
        every=AT_EXPORT if context.quick else 1,
    )
    misread = reading.misread(file, ChatText.of(bundle), expected.apart)
    checks.append(stated("text", "bundle", "tokens", misread is None, misread or ""))
    return checks


def _same(output: str, measured: object, expected: object) -> Check:
    note = (
        ""
        if measured == expected
        else f"{measured!r:.60} in the bundle, {expected!r:.60} in the source"
    )
    return stated("text", "bundle", output, not note, note)


def _adapter(context: Context) -> tuple[list[Check], FirstDifference | None]:
    """The adapter as PEFT reads it, and as the programs are given it."""
    manifest = context.bundle.manifest
    as_read = context.source.as_read
    forms = {"programs' form": context.adapters[INITIAL]}
    again = to_runtime(read_peft(context.bundle.peft), manifest.adapter.tensors)
    forms["manifest's places"] = {name: again[name] for name in as_read}
    checks: list[Check] = []
    first: FirstDifference | None = None
    for form, values in forms.items():
        form_checks = []
        for name, expected in as_read.items():
            padded = np.zeros(values[name].shape, np.float32)
            padded[tuple(slice(0, n) for n in expected.shape)] = expected
            check = compare("adapter", form, name, values[name], padded, TABLE["exact"])
            form_checks.append(check)
            if first is None and not check.passed:
                layer = int(name.split(".")[1])
                sentence = (
                    f"layer {layer}: {name} in the {form} of the adapter is not PEFT's, off by "
                    f"{check.max_rel:.2g} of its range."
                )
                first = FirstDifference(layer, "LoRA " + name.split(".", 2)[2], sentence)
        checks += worst(form_checks)
    return checks, first


def _eager_outputs(context: Context) -> LmOutputs:
    model = context.source.eager
    outputs = LmOutputs({}, {}, {}, {}, {})
    for name, values in context.adapters.items():
        set_peft_adapter(model, context.bundle.manifest.adapter.tensors, values)
        for case in context.cases:
            outputs.logits[name, case.name] = eager_logits(model, case.tokens, case.prompt - 1)
    for case in context.cases:
        tokens = case.tokens[: context.bundle.manifest.policy.embed_length]
        outputs.pooled[case.name], outputs.entropy[case.name] = eager_embedding(model, tokens)
    context.eager = outputs
    return outputs


def _wide_logits(context: Context, adapter: str, name: str) -> np.ndarray:
    """Hugging Face's and PEFT's in float64."""
    model = context.source.eager
    set_peft_adapter(model, context.bundle.manifest.adapter.tensors, context.adapters[adapter])
    case = next(case for case in context.cases if case.name == name)
    with Wide():
        return eager_logits(model, case.tokens, case.prompt - 1)


def captured(context: Context) -> Rung:
    """The functions that become programs, in float32, against Hugging Face and PEFT."""
    manifest, models = context.bundle.manifest, context.source
    model = models.captured
    measured = outputs_of(model, context.cases, context.adapters, manifest)
    expected = context.eager or _eager_outputs(context)
    bounds = of_floats(context, expected, lambda *which: _wide_logits(context, *which))
    checks = compared(measured, expected, context.cases, bounds)
    first, layers = None, []
    if manifest.training is not None:
        engine = StreamingEngine(
            context.float_programs, context.float_weights, context.bundle.training
        )
        reference = context.peft_engine()
        for example, adapter in context.trained:
            context.progress(f"captured: training on {example.id}")
            values = context.adapters[adapter]
            set_peft_adapter(models.eager, manifest.adapter.tensors, values)
            case = f"{example.id}, {adapter}"
            logit = largest_logit(model, example.tokens, values)
            set_peft_adapter(models.eager, manifest.adapter.tensors, values)
            checks += training_checks.against(
                engine, reference, context.bundle, values, example, case, model.spec, logit
            )
    tokens = _worst_case(checks, context)
    set_peft_adapter(models.eager, manifest.adapter.tensors, context.adapters[EFFECT])
    set_adapter(model, context.adapters[EFFECT])
    expected_places = probes.of_hugging_face(models.eager, model.spec, tokens)
    layers = probes.differences(probes.of_transformer(model, tokens), expected_places)
    if any(not check.passed for check in checks):
        noticed = of_block(model.spec, len(tokens)).max_rel or 0.0
        first = probes.first_difference(layers, noticed) or _training_place(checks)
    return rung("captured", "eager", checks, first, layers)


def _worst_case(checks: Sequence[Check], context: Context) -> np.ndarray:
    failed = {check.case.rpartition(", ")[0] for check in checks if not check.passed}
    for case in context.cases:
        if case.name in failed:
            return case.tokens
    return context.cases[0].tokens


def _training_place(checks: Sequence[Check]) -> FirstDifference | None:
    """Where only training differs: the last layer with a wrong gradient, since the backward goes
    from the last layer to the first."""
    failed = [check for check in checks if not check.passed]
    if not failed:
        return None
    if failed[0].program == "adamw":
        return FirstDifference(
            None, "adamw", f"adamw: {failed[0].output} is off by {failed[0].max_rel:.2g}."
        )
    layered = [check for check in failed if check.layer is not None]
    if not layered:
        return None
    last = max(layered, key=lambda check: check.layer or 0)
    return FirstDifference(
        last.layer,
        last.output,
        f"layer {last.layer}: the {last.output} is off by {last.max_rel:.2g} of its range on "
        f"'{last.case}', and those of later layers are not.",
    )


def quantized(context: Context) -> Rung:
    """The weights that the bundle has: are they the source's, and what did rounding cost."""
    manifest, models = context.bundle.manifest, context.source
    checks: list[Check] = []
    first: FirstDifference | None = None
    expected = context.eager or _eager_outputs(context)
    layers: list[tuple[str, float]] = []
    cost = TABLE["rounded weights"]
    bounds = Bounds(cost, cost, TABLE["adapter, rounded weights"])
    if manifest.android is not None:
        checks += compared(context.android, expected, context.cases, bounds, "android lm")
        tokens = context.cases[0].tokens
        set_adapter(models.captured, context.adapters[INITIAL])
        places = [probes.of_transformer(m, tokens) for m in (models.android, models.captured)]
        layers = probes.differences(*places)
    if manifest.ios is not None:
        measured = outputs_of(models.ios, context.cases, context.adapters, manifest)
        checks += compared(measured, expected, context.cases, bounds, "ios lm")
        context.ios = measured
    if manifest.training is not None:
        context.progress("quantized: the weights file")
        bundle = context.bundle
        stored, first = weights_checks.training_file(
            bundle.training_weights, bundle.training, models.simulated
        )
        checks += stored
        engine = StreamingEngine(context.programs, context.weights, context.bundle.training)
        reference = TransformerEngine(models.stored, context.bundle.training.optimizer)
        for example, adapter in context.trained:
            context.progress(f"quantized: training on {example.id}")
            case = f"{example.id}, {adapter}"
            values = context.adapters[adapter]
            logit = largest_logit(models.stored, example.tokens, values)
            spec = models.captured.spec
            checks += training_checks.against(
                engine, reference, context.bundle, values, example, case, spec, logit
            )
    first = first or _training_place([c for c in checks if c.program in ("block + head", "adamw")])
    return rung("quantized", "eager", checks, first, layers)
