"""Keys and values have their room from the start, and a long prompt goes through in pieces."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from host_client.runtime.kv_cache import PreallocatedLayer
from host_client.runtime.memory_limit import prompt_chunk_tokens
from tests.runtime.decoding import decode

NAME = "untied"
CONTEXT = 24


@pytest.fixture
def model(lab):
    return lab.open(NAME, context=CONTEXT)


def addresses(cache: DynamicCache) -> list[int]:
    return [part.data_ptr() for layer in cache.layers for part in (layer.keys, layer.values)]


def test_a_token_is_written_where_there_is_room(lab, model, tokens_of) -> None:
    cache = DynamicCache(config=model.config)
    ids = tokens_of(lab, NAME, CONTEXT)
    model(ids[:, :5], past_key_values=cache, use_cache=True)
    assert all(type(layer) is PreallocatedLayer for layer in cache.layers)
    at = addresses(cache)
    held = sum(layer.keys.untyped_storage().nbytes() for layer in cache.layers)
    assert 2 * held == model.csd.plan.kv_bytes
    for token in ids[:, 5:].split(1, dim=1):
        model(token, past_key_values=cache, use_cache=True)
        assert addresses(cache) == at
    assert cache.get_seq_length() == CONTEXT


def test_texts_share_the_room(lab, model, tokens_of) -> None:
    cache = model(tokens_of(lab, NAME, 4).repeat(3, 1), use_cache=True).past_key_values
    held = sum(layer.keys.untyped_storage().nbytes() for layer in cache.layers)
    assert 2 * held == model.csd.plan.kv_bytes


def test_what_is_cut_off_is_written_over(lab, model, tokens_of) -> None:
    ids = tokens_of(lab, NAME, 12)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids.flip(1)[:, :6], past_key_values=cache, use_cache=True)
        cache.crop(-6)
        model(ids[:, :9], past_key_values=cache, use_cache=True)
        cache.crop(-4)
        ends = model(ids[:, 5:], past_key_values=cache, use_cache=True).logits
    assert torch.allclose(ends, decode(model, ids)[:, 5:], atol=1e-5)


def test_beams_are_those_of_transformers(lab, model, tokens_of) -> None:
    ids = tokens_of(lab, NAME, 4)
    asked = {"num_beams": 3, "do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    dense = lab.zoo.dense(NAME).generate(ids, **asked)
    assert model.generate(ids, **asked).tolist() == dense.tolist()


@pytest.mark.parametrize("make", [lambda config: DynamicCache(), None])
def test_other_caches_stay_what_they_are(lab, model, tokens_of, make) -> None:
    ids = tokens_of(lab, NAME, 8)
    cache = make(model.config) if make else StaticCache(model.config, max_cache_len=CONTEXT)
    kinds = [type(layer) for layer in cache.layers]
    with torch.inference_mode():
        logits = model(ids, past_key_values=cache, use_cache=True).logits
        dense = lab.zoo.dense(NAME)(ids).logits
    assert [type(layer) for layer in cache.layers][: len(kinds)] == kinds
    assert torch.allclose(logits, dense, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 3, 5, 20, 64])
def test_a_prompt_in_pieces_is_answered_as_in_one(lab, model, tokens_of, greedy, chunk) -> None:
    ids = tokens_of(lab, NAME, 15)
    whole = greedy(lab.zoo.dense(NAME), ids, new=6)
    assert model.generation_config.prefill_chunk_size == prompt_chunk_tokens(64)
    model.generation_config.prefill_chunk_size = chunk
    assert greedy(model, ids, new=6) == whole


def test_pieces_of_padded_texts(lab, model) -> None:
    ids = torch.tensor([[0, 0, 0, 7, 9, 11, 30], [4, 5, 6, 7, 8, 9, 10]])
    mask = (ids != 0).long()
    asked = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    dense = lab.zoo.dense(NAME).generate(ids, **asked)
    model.generation_config.prefill_chunk_size = 2
    assert model.generate(ids, **asked).tolist() == dense.tolist()


@pytest.mark.parametrize("hidden, tokens", [(576, 512), (4096, 204), (1 << 22, 1)])
def test_wide_models_take_less_at_once(hidden: int, tokens: int) -> None:
    assert prompt_chunk_tokens(hidden) == tokens
