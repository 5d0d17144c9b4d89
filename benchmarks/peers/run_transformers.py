"""transformers' generate in bfloat16, batches padded left, greedy, without an end of sequence.

python run_transformers.py '{"model": FOLDER, "threads": 2}'
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from job_loop import Prompt, reserve_output, serve, settings
from transformers import AutoModelForCausalLM

PAD = 0


def main() -> None:
    write, given = reserve_output(), settings()
    torch.set_num_threads(given["threads"])
    model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD

    @torch.inference_mode()
    def generate(prompts: Sequence[Prompt], max_tokens: int) -> int:
        longest = max(map(len, prompts))
        tokens = torch.full((len(prompts), longest), PAD)
        mask = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        out = model.generate(
            tokens, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False
        )
        return (out.shape[1] - longest) * len(prompts)

    serve(write, ("transformers", "torch"), generate)


if __name__ == "__main__":
    main()
