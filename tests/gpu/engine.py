"""A real vLLM engine on a GPU, run by test_engine.py as ``python tests/gpu/engine.py ENDPOINT_PORT LAYOUT``.

Many prompts at once are computed and stored; then the GPU forgets and spoils all its blocks, and the same prompts come
again. Prints one line of JSON: what was loaded, and which blocks have other bytes than those that were computed.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 6,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
    "head_dim": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def engine(port: int) -> Any:
    """A small model, with CUDA graphs and asynchronous scheduling as they are by default."""
    from vllm import LLM
    from vllm.config import KVTransferConfig

    folder = Path(tempfile.mkdtemp(prefix="kvmp-gpu-"))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    transfer = KVTransferConfig(
        kv_connector="ProbedConnector",
        kv_connector_module_path="probe",
        kv_role="kv_both",
        kv_connector_extra_config={"kvmp.endpoint": f"tcp://localhost:{port}"},
    )
    return LLM(
        str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        max_model_len=4096,
        kv_transfer_config=transfer,
        enable_prefix_caching=True,
        num_gpu_blocks_override=4096,
        max_num_batched_tokens=2048,
        gpu_memory_utilization=0.3,
    )


def main(port: int) -> None:
    sys.path.insert(0, str(FOLDER))
    os.environ["PYTHONPATH"] = f"{FOLDER}:{os.environ.get('PYTHONPATH', '')}"
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # for functions of `probe` as calls
    import probe
    from vllm import SamplingParams

    llm, rng = engine(port), random.Random(1)
    few = SamplingParams(temperature=0, max_tokens=24, detokenize=False, ignore_eos=True)
    # Never whole blocks: of a prompt that is found whole the last token is computed again, into its last block.
    lengths = [16 * rng.randrange(20, 200) + rng.randrange(1, 16) for _ in range(24)]
    prompts = [{"prompt_token_ids": [rng.randrange(10, 30000) for _ in range(length)]} for length in lengths]
    llm.generate(prompts, few, use_tqdm=False)
    [computed] = llm.collective_rpc(probe.bytes_of_cached_blocks)
    time.sleep(2)  # for the last stores; what is found is counted below
    assert llm.reset_prefix_cache(), "the GPU's blocks are still in use"
    [left] = llm.collective_rpc(probe.bytes_of_cached_blocks)
    llm.collective_rpc(probe.poison)
    again = llm.generate(prompts, few, use_tqdm=False)
    [now] = llm.collective_rpc(probe.bytes_of_cached_blocks)
    [facts] = llm.collective_rpc(probe.facts)
    prefix = {key for key in now if key in computed}
    result = {
        "cached_tokens": [output.num_cached_tokens for output in again],
        "lengths": lengths,
        "left": len(left),
        "blocks": len(prefix),
        "other_bytes": sum(now[key] != computed[key] for key in prefix),
        "distinct": len(set(computed.values())),
        "computed": len(computed),
        **facts,
    }
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
