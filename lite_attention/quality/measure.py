"""All that a plan has, one result after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lite_attention.quality.decoder import Decoder
from lite_attention.quality.generation import make_prompts, measure_agreement
from lite_attention.quality.loss import measure_loss
from lite_attention.quality.plan import Plan
from lite_attention.quality.results import Run
from lite_attention.quality.retrieval import NEEDLES, make_cases, measure_retrieval
from lite_attention.quality.setting import Setting
from lite_attention.quality.texts import Text, windows


def measure(
    plan: Plan,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    run: Run,
    done: Callable[[str], None],
) -> Iterator[None]:
    """Adds to `run`; yields whenever something was added. `done` is told what is done."""
    if "loss" in plan.parts:
        decoder = Decoder(model, 1, plan.context, plan.sketch_bits)
        for name, tokens in windows(texts, tokenizer, plan.context, model.device):
            run.loss += measure_loss(decoder, name, tokens, plan.positions, plan.settings, done)
            yield
    if "retrieval" in plan.parts:
        for length in plan.lengths:
            for kind in NEEDLES:
                cases = make_cases(kind, texts, tokenizer, length, plan.cases)
                run.retrieval += measure_retrieval(
                    model, tokenizer, kind, length, cases, plan.settings, done, plan.sketch_bits
                )
                yield
    if "generation" in plan.parts:
        longest = plan.context - plan.tokens
        prompts = make_prompts(texts, tokenizer, plan.context // 4, longest, plan.prompts)
        rounding = () if any(setting.eps == 0 for setting in plan.settings) else (Setting(0.0),)
        settings = (*rounding, *plan.settings)
        run.generation += measure_agreement(model, tokenizer, prompts, plan.tokens, settings, done, plan.sketch_bits)
        yield
