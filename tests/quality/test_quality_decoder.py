"""A Hugging Face model over paged caches: dense and step by step, beside transformers' own attention."""

from __future__ import annotations

import pytest
import torch
import transformers
from quality_models import HEAD_DIM, HEADS, HEADS_K, LAYERS, VOCABULARY, write_model

from lite_attention.pages import PAGE, PageLists, attend_pages, select_pages, sketch_bytes, write_sketch
from lite_attention.quality import decoder as decoding
from lite_attention.quality.decoder import NAME, Decoder
from lite_attention.quality.load import load
from lite_attention.quality.loss import measure_loss
from lite_attention.quality.setting import DENSE, Setting
from lite_attention.quality.tally import Tally

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sharp(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("sharp"), sharp=4.0)


@pytest.fixture(scope="module")
def model(sharp):
    return load(sharp, CPU, "auto")[0]


def tokens_of(n, seed=0):
    return torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed))


def decode_by(select, attend=attend_pages):
    """Stands in for `decode_pages`: its three calls, with one's own choice of pages."""

    def decode(q, k, v, sketch, *batch, filled, softmax_scale, num_splits, **of_lists):
        write_sketch(k, sketch, filled)
        lists = select(q, sketch, *batch, softmax_scale=softmax_scale, **of_lists)
        return *attend(q, k, v, lists, *batch, softmax_scale=softmax_scale, num_splits=num_splits), lists

    return decode


def theirs(folder, tokens):
    """Logits of all positions by transformers, (n, vocab)."""
    eager = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        return eager(tokens[None]).logits[0]


@pytest.mark.parametrize("setting", [DENSE, Setting(0.0), Setting(0.5, newest=1, dense_layers=(0, 1, -1))])
def test_without_anything_left_out_logits_are_those_of_transformers(setting, sharp, model):
    tokens, decoder = tokens_of(203), Decoder(model, 1, 203)
    expected = theirs(sharp, tokens)
    last = decoder.prefill(0, tokens[:150])
    torch.testing.assert_close(last, expected[149], rtol=1e-3, atol=1e-3)
    parts = [decoder.decode([0], part[None], setting)[0] for part in tokens[150:].split(30)]
    torch.testing.assert_close(torch.cat(parts), expected[150:], rtol=1e-3, atol=1e-3)


def test_many_steps_in_a_call_are_one_step_after_the_other(model):
    setting, tokens = Setting(0.3, newest=16), tokens_of(300)
    decoder = Decoder(model, 2, 300)
    for row in range(2):
        decoder.prefill(row, tokens[:200])
    at_once = decoder.decode([1], tokens[None, 200:], setting)[0]
    dense = Decoder(model, 1, 300)
    dense.prefill(0, tokens[:200])
    assert (dense.decode([0], tokens[None, 200:], DENSE)[0] - at_once).abs().max() > 0.01  # something was left out
    one_by_one = [decoder.decode([0], token.view(1, 1), setting)[0] for token in tokens[200:]]
    torch.testing.assert_close(at_once, torch.cat(one_by_one), rtol=1e-3, atol=1e-3)


def test_sequences_of_different_lengths_are_those_they_are_alone(model):
    setting, lengths = Setting(0.3, newest=16), (33, 160, 97)
    texts = [tokens_of(length + 5, seed) for seed, length in enumerate(lengths)]
    together, alone = Decoder(model, 3, 170), []
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        together.prefill(row, text[:length])
        one = Decoder(model, 1, 170)
        one.prefill(0, text[:length])
        alone.append(one.decode([0], text[None, length:], setting)[0])
    found = together.decode(range(3), torch.stack([text[-5:] for text in texts]), setting)
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-3, atol=1e-3)


def test_going_back_forgets(model):
    tokens, other = tokens_of(190), tokens_of(40, seed=1)
    decoder = Decoder(model, 1, 230)
    decoder.prefill(0, tokens[:150])
    expected = decoder.decode([0], tokens[None, 150:], Setting(0.3, newest=16))
    decoder.truncate(0, 150)
    decoder.decode([0], other[None], Setting(0.3, newest=16))
    decoder.truncate(0, 150)
    assert torch.equal(decoder.decode([0], tokens[None, 150:], Setting(0.3, newest=16)), expected)


def test_bytes_and_masses_are_counted_right(model, monkeypatch):
    """Lists of pages 0, 2 and the last, of 64 tokens and more; mass by hand."""

    def fixed(q, sketch, cu_seqlens_q, seqused_k, block_table, *args, **kwargs):
        lists = PageLists.empty(len(seqused_k), HEADS_K, HEADS, block_table.shape[1], CPU)
        for b, length in enumerate(seqused_k.tolist()):
            listed = torch.zeros(HEADS_K, -(-length // PAGE), dtype=torch.bool)
            listed[:, [0, 2, -1]] = True
            lists.write(b, listed)
        lists.left_out.fill_(0.25)
        return lists

    tokens, tally, decoder = tokens_of(70), Tally(0.1), Decoder(model, 1, 70)
    decoder.prefill(0, tokens[:62])
    masses = []

    def watched(q, k, v, lists, cu, seqused_k, table, *args, **kwargs):
        for b, length in enumerate(seqused_k.tolist()):
            keys = k.flatten(0, 1)[:length].repeat_interleave(HEADS // HEADS_K, 1)
            weights = (torch.einsum("hd,thd->ht", q[b], keys) * HEAD_DIM**-0.5).softmax(-1)
            pages = torch.arange(length) // PAGE
            seen = (pages == 0) | (pages == 2) | (pages == (length - 1) // PAGE)
            masses.append(weights[:, ~seen].sum(-1))
        return attend_pages(q, k, v, lists, cu, seqused_k, table, *args, **kwargs)

    monkeypatch.setattr(decoding, "decode_pages", decode_by(fixed, watched))
    decoder.decode([0], tokens[None, 62:], Setting(0.1, dense_layers=(1,)), tally)
    assert list(tally.layers()) == [0, 1, 2]
    # Steps see 63 to 70 tokens: 4 pages twice and 5 six times, of which 3 and 4 twice and 6 times are full.
    visible, listed, full = 2 * 4 + 6 * 5, 8 * 3, 3 + 4 * 7
    page_bytes = 2 * PAGE * HEAD_DIM * 4
    for layer in (0, 2):
        read = tally.layers()[layer]
        assert read.pages == pytest.approx(listed / visible)
        assert read.sketches == pytest.approx(full * sketch_bytes(HEAD_DIM) / (visible * page_bytes))
        assert read.left_out_estimate == pytest.approx(0.25)
    mass = torch.stack(masses)
    assert tally.layers()[0].left_out == pytest.approx(mass[:8].mean().item(), abs=1e-5)
    assert tally.layers()[2].left_out == pytest.approx(mass[8:].mean().item(), abs=1e-5)
    assert tally.layers()[2].over_budget == pytest.approx((mass[8:] > 0.1).double().mean().item())
    dense, total = tally.layers()[1], tally.total()
    assert (dense.pages, dense.sketches, dense.left_out) == (1, 0, 0)
    assert total.bytes == pytest.approx((2 * tally.layers()[0].bytes + 1) / LAYERS)
    assert total.left_out == pytest.approx(mass.mean().item() * 2 / 3, abs=1e-5)


def _random_instead(*args, **kwargs):
    """As many pages as the lists have, but any."""
    lists = select_pages(*args, **kwargs)
    dice = torch.Generator().manual_seed(0)
    for b, length in enumerate(args[3].tolist()):
        pages = -(-length // PAGE)
        listed = torch.zeros(HEADS_K, pages, dtype=torch.bool)
        for head in range(HEADS_K):
            listed[head, torch.randperm(pages, generator=dice)[: lists.counts[b, head]]] = True
        lists.write(b, listed)
    return lists


def test_a_wrong_choice_of_pages_shows(tmp_path, monkeypatch):
    model, _ = load(write_model(tmp_path), CPU, "auto")
    tokens = tokens_of(44).repeat_interleave(PAGE)  # all of a page alike, so that its sketch says nearly all
    settings, decoder = [Setting(0.0), Setting(0.1, newest=16)], Decoder(model, 1, len(tokens))
    nothing, right = measure_loss(decoder, "text", tokens, 60, settings)
    monkeypatch.setattr(decoding, "decode_pages", decode_by(_random_instead))
    _, wrong = measure_loss(decoder, "text", tokens, 60, settings)
    assert nothing.read.bytes == 1 and abs(nothing.change) < 1e-3 and nothing.divergence < 1e-4
    assert nothing.same_first == 1 and nothing.read.left_out < 1e-4 and nothing.read.over_budget == 0
    assert 0.2 < right.read.bytes < 0.4 and right.read.bytes == pytest.approx(wrong.read.bytes, rel=0.1)
    assert wrong.divergence > 10 * right.divergence > 0
    assert wrong.read.left_out > 0.5 > 0.15 > right.read.left_out > 0
    assert wrong.read.over_budget > 0.9 > 0.5 > right.read.over_budget
    assert wrong.same_first < right.same_first


def test_perplexity_is_that_of_transformers(sharp, model):
    tokens = tokens_of(300)
    (found,) = measure_loss(Decoder(model, 1, 300), "text", tokens, 100, [Setting(0.0)])
    nll = torch.nn.functional.cross_entropy(theirs(sharp, tokens)[-101:-1], tokens[-100:])
    assert found.perplexity == pytest.approx(nll.exp().item(), rel=1e-4)
    assert (found.context, found.positions) == (300, 100)


def test_the_change_and_its_error_are_those_of_the_positions(model, monkeypatch):
    """Three positions whose losses are known: a listed step says 0.5, 1 and 3 nats more than dense."""
    dense = torch.tensor([[2.0, 0.0], [1.0, 0.0], [3.0, 0.0]]).log_softmax(-1)
    more = torch.tensor([0.5, 1.0, 3.0])
    listed = torch.stack([dense[:, 0] - more, (1 - (dense[:, 0] - more).exp()).log()], dim=1)

    class Known:
        model = None
        truncate = prefill = lambda *args: None

        def decode(self, rows, tokens, setting, tally):
            if tally is not None:
                tally._add(0, torch.ones(7, dtype=torch.float64))
            return (dense if setting == DENSE else listed)[None]

    (found,) = measure_loss(Known(), "text", torch.zeros(5, dtype=torch.long), 3, [Setting(0.1)])
    assert found.perplexity == pytest.approx((more - dense[:, 0]).mean().exp().item())
    assert found.change == pytest.approx((1.5 * torch.ones(())).exp().item() - 1)
    assert found.change_error == pytest.approx((found.change + 1) * more.std(correction=0).item() / 3**0.5)
    divergence = (dense.exp() * (dense - listed)).sum(-1).mean()
    assert found.divergence == pytest.approx(divergence.item(), rel=1e-5)
    assert found.same_first == pytest.approx((listed[:, 0] > listed[:, 1]).double().mean().item())


def test_layers_with_a_window_see_the_window_and_are_not_counted(tmp_path):
    window = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 40}
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        initializer_range=0.2,
        **window,
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME).eval()
    tokens, tally, decoder = tokens_of(150), Tally(0.0), Decoder(model, 1, 150)
    decoder.prefill(0, tokens[:100])
    found = decoder.decode([0], tokens[None, 100:], Setting(0.0), tally)[0]
    torch.testing.assert_close(found, theirs(tmp_path, tokens)[100:], rtol=1e-3, atol=1e-3)
    assert list(tally.layers()) == [0]


def test_what_it_refuses(model, sharp):
    decoder = Decoder(model, 1, 32)
    with pytest.raises(ValueError, match="tokens: got 33 after 0; needs 32 together"):
        decoder.prefill(0, tokens_of(33))
    with pytest.raises(ValueError, match="length: got 1; needs 0 to 0"):
        decoder.truncate(0, 1)
    with pytest.raises(NotImplementedError, match="got no lite_attention_step"):
        model(tokens_of(3)[None])
    eager = transformers.AutoModelForCausalLM.from_pretrained(sharp, attn_implementation="eager")
    with pytest.raises(ValueError, match="model: got attn_implementation 'eager'"):
        Decoder(eager, 1, 32)
    with pytest.raises(NotImplementedError, match="got softcap"):
        decoding._attention(model, *(torch.zeros(1, 1, 1, 8),) * 3, None, softcap=1.0, lite_attention_step=object())
