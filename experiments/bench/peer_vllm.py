"""vLLM, as a worker of sampling.py. Runs under an interpreter that has it."""

import json
import sys
import time


def main():
    job = json.load(sys.stdin)
    began = time.monotonic()
    import vllm  # slow to import, which is part of its start

    llm = vllm.LLM(
        model=job["model"],
        dtype=job["dtype"],
        max_num_seqs=len(job["prompts"]) * job["n"],
        max_model_len=1024,
    )
    prompts = [dict(prompt_token_ids=prompt) for prompt in job["prompts"]]

    def run(new_tokens):
        how = vllm.SamplingParams(
            n=job["n"],
            temperature=job["temperature"],
            max_tokens=new_tokens,
            ignore_eos=job["temperature"] > 0,  # for speed all tokens are made
            detokenize=False,
        )
        return llm.generate(prompts, how, use_tqdm=False)

    run(2)
    started = time.monotonic()
    out = run(job["new"])
    seconds = time.monotonic() - started
    tokens = [list(request.outputs[0].token_ids) for request in out]
    result = dict(seconds=seconds, tokens=tokens, version=vllm.__version__, start=started - began)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
