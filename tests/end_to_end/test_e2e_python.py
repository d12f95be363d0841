"""The Python way in, as the README shows it."""

import threading

from real_model import MODEL, PROMPTS, Device, Reference
from transformers import PreTrainedTokenizerBase, TextIteratorStreamer

from host_client import CsdModelForCausalLM


def test_chat_streamed_from_a_thread(
    device: Device, tokenizer: PreTrainedTokenizerBase, reference: Reference
) -> None:
    model = CsdModelForCausalLM.from_pretrained(MODEL, drive=device.address, dram="45%")
    try:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": PROMPTS[0]}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        options = dict(inputs, streamer=streamer, max_new_tokens=24, do_sample=False)
        thread = threading.Thread(target=model.generate, kwargs=options)
        thread.start()
        pieces = list(streamer)
        thread.join()
    finally:
        model.csd.close()
    assert len(pieces) > 4
    assert "".join(pieces) == tokenizer.decode(reference.spoken[0].tokens[:24])


def test_sampling_and_beams_run(device: Device, tokenizer: PreTrainedTokenizerBase) -> None:
    """Whatever `generate` can do: several rows at once, their cache reordered between steps."""
    model = CsdModelForCausalLM.from_pretrained(MODEL, drive=device.address, dram="60%")
    try:
        inputs = tokenizer("The capital of France is", return_tensors="pt")
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
        sampled = model.generate(**inputs, **options, do_sample=True)
        beams = model.generate(**inputs, **options, do_sample=False, num_beams=2)
    finally:
        model.csd.close()
    assert sampled.shape == (1, inputs.input_ids.shape[1] + 4)
    assert "Paris" in tokenizer.decode(beams[0])
