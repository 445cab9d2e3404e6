"""What loading the data does not load."""

import subprocess
import sys


def test_data_load_neither_the_model_nor_lightnings_trainer():
    kinds = "data.agent_traces, data.passkey, data.plain_text, data.scrolls, data.user_behavior"
    code = f"import sys, {kinds}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"comet_pl.model.modeling_comet", "lightning", "datasets"} & {*loaded.stdout.split()}
