"""Sampling beside transformers.generate: new tokens a second of whole calls, prompts read included.

    make bench-rollout
    make bench-rollout ARGS="--sizes S --repeats 1 --new-tokens 16"

Prompts of HH, 64 new tokens each, the end of sequence banned on both sides, so that both draw equally many. By turns in
one process. generate keeps its cache as it does by default, or statically; compiled with a static cache only for one
case, since every shape takes over a minute to compile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import given
import side_by_side as bench
import torch
from rounds import fitting

CASES = {"S": ((8, 1), (32, 1), (64, 1)), "M": ((8, 1), (32, 1), (64, 8))}
"""Of each size: rows, and samples of each prompt."""
COMPILED = ("S", 32)
TOLERANCE = 1e-4
"""Largest difference of a drawn token's log-probability to that of the plain model."""
REMARK = (
    "Random Llamas in fp32, prompts of 16 to 64 tokens. The whole distribution is sampled at temperature 1. agree: "
    "our log-probabilities of what we drew are those of the plain model, and both sides drew as many tokens. The "
    "compiled case was called once before, to compile (seconds_to_compile)."
)
Sample = Callable[[], Any]


def native(folder: Path, prompts: Sequence[Any], samples: int, new_tokens: int) -> Sample:
    from fairlead.config import ModelSection
    from fairlead.data.render import Renderer
    from fairlead.models.load import load_base, load_tokenizer
    from fairlead.models.roles import Models
    from fairlead.rollout.native import NativeSampler
    from fairlead.types import Prompt, Sampling

    tokenizer, device = load_tokenizer(str(folder)), torch.device("cpu")
    base = load_base(ModelSection(path=str(folder)), tokenizer, None, seed=0, device=device)
    renderer = Renderer(tokenizer, template=given.TEMPLATE, max_length=given.LENGTH)
    sampler = NativeSampler(Models(base, ("policy",)), renderer, rows=len(prompts) * samples)
    asked = [Prompt(pair.record.prompt) for pair in prompts]
    sampling = Sampling(new_tokens, min_new_tokens=new_tokens)
    return lambda: sampler.generate(asked, sampling=sampling, key=(0,), num_samples=samples)


def plain(folder: Path, prompts: Sequence[Any], samples: int, new_tokens: int, cache: str, *, compiled: bool) -> Sample:
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = [pair.ids["prompt_ids"] for pair in prompts]
    width, pad = max(map(len, ids)), model.config.pad_token_id
    given_ids = torch.tensor([[pad] * (width - len(each)) + each for each in ids])
    seen = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in ids])
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        num_return_sequences=samples,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=pad,
        cache_implementation=None if cache == "dynamic" else cache,
        use_cache=True,
    )
    if compiled:
        model.forward = torch.compile(model.forward, dynamic=True)

    @torch.no_grad()
    def sample() -> Any:
        return model.generate(given_ids, attention_mask=seen, generation_config=settings)[:, width:]

    return sample


def timed(sample: Sample) -> tuple[float, Any]:
    began = time.perf_counter()
    found = sample()
    return time.perf_counter() - began, found


def difference(folder: Path, rollouts: Sequence[Any]) -> float:
    """The largest, between our log-probabilities and those of the plain model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    worst = 0.0
    for each in rollouts:
        ids = torch.tensor([[*each.prompt_ids, *each.response_ids]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(each.prompt_ids) - 1 : -1]
        assert each.banned is not None
        logits[:, each.banned[0]] = -torch.inf
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(each.response_ids)[:, None])[:, 0]
        worst = max(worst, float((logprobs - torch.tensor(each.behaviour_logprobs)).abs().max()))
    return worst


def measure(size: str, folder: Path, prompts: Sequence[Any], samples: int, settings: Any) -> list[dict[str, Any]]:
    """The lines of one case, the peer's settings side by side."""
    rows, new_tokens = len(prompts) * samples, settings.new_tokens
    case = f"{size}, {rows} rows" + (f", {samples} samples a prompt" if samples > 1 else "")
    ours = native(folder, prompts, samples, new_tokens)
    ways = {"dynamic cache": plain(folder, prompts, samples, new_tokens, "dynamic", compiled=False)}
    ways["static cache"] = plain(folder, prompts, samples, new_tokens, "static", compiled=False)
    if (size, rows) == COMPILED and not settings.no_compile:
        ways["static cache, compiled"] = plain(folder, prompts, samples, new_tokens, "static", compiled=True)
    apart = difference(folder, timed(ours)[1])
    first = {way: timed(sample)[0] for way, sample in ways.items()}
    mine, theirs, equal = list[float](), {way: list[float]() for way in ways}, True
    for number in range(settings.repeats):
        seconds, rollouts = timed(ours)
        mine.append(rows * new_tokens / seconds)
        for way, sample in ways.items():
            seconds, found = timed(sample)
            theirs[way].append(rows * new_tokens / seconds)
            equal &= found.numel() == sum(len(each.response_ids) for each in rollouts) == rows * new_tokens
        rates = ", ".join(f"{way} {values[-1]:,.0f}" for way, values in theirs.items())
        bench.say(f"{case}, {number + 1}/{settings.repeats}: {mine[-1]:,.0f} /s; {rates}; apart {apart:.1e}")
    best = max(ways, key=lambda way: sorted(theirs[way])[len(theirs[way]) // 2])
    return [
        {
            "case": case,
            "metric": "new tokens a second",
            "unit": "1/s",
            **bench.compared(mine, theirs[way]),
            "peer_name": f"transformers.generate, {way}",
            "best_of_peer": way == best,
            "repeats": settings.repeats,
            "agree": equal and apart <= TOLERANCE,
            "logprobs_differ_by": float(f"{apart:.1e}"),
            **({"seconds_to_compile": round(first[way], 1)} if "compiled" in way else {}),
        }
        for way in ways
    ]


def main() -> None:
    parser = bench.options(__doc__, "rollout")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled case out")
    settings = parser.parse_args()
    data = bench.data_folder(parser, settings)
    rows = given.transcripts(data)
    cases: list[dict[str, Any]] = []
    with bench.scratch() as folder:
        for size in settings.sizes:
            texts = [row["chosen"] for row in rows]
            tokenizer = given.save_model(folder / size, size, [*texts, *given.books(data)])
            pairs = fitting(rows, tokenizer)
            for number, samples in CASES[size]:
                cases += measure(size, folder / size, pairs[: number // samples], samples, settings)
    found = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    bench.write_results(settings.out, "rollout", cases, found, REMARK, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
