"""vLLM's connector to kvmp.

vLLM knows it by name (``plugin``): ``kv_connector="KvmpConnector"`` and ``kv_role="kv_both"``; where vLLM's plugins are
switched off, also ``kv_connector_module_path="kvmp.vllm.connector"``.
"""
