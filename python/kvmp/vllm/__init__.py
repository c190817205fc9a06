"""vLLM's connector to kvmp.

Point vLLM at ``kvmp.vllm.connector`` with ``kv_connector="KvmpConnector"``,
``kv_connector_module_path="kvmp.vllm.connector"`` and ``kv_role="kv_both"``.
"""
