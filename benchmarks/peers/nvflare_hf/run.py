"""NVFlare's Hugging Face Client API, set up as in its own example (``examples/advanced/llm_hf``): its recipe
of federated averaging in the simulator, and ``transformers.Trainer`` in a process of its own at every site.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
os.environ["PYTHONPATH"] = str(HERE.parent)  # for the simulator and the sites
sys.path[:0] = [str(HERE), str(HERE.parent)]
from flare_server import AdapterPersistor
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.client.config import ExchangeFormat
from nvflare.recipe import SimEnv
from work import Job


def main() -> None:
    """``run.py JOB RESULT``."""
    folder, result = (str(Path(name).resolve()) for name in sys.argv[1:3])
    job = Job(folder)
    if any(list(plan) != job.clients for plan in job.rounds):
        raise SystemExit("this engine needs every client in every round")
    if len({len(item["batches"]) for plan in job.rounds for item in plan.values()}) > 1:
        raise SystemExit("this engine makes as many steps at every client and in every round")
    os.chdir(HERE)  # the recipe names its script relative to the folder that it is started in
    recipe = FedAvgRecipe(
        name="bench",
        model_persistor=AdapterPersistor(folder, result),
        min_clients=len(job.clients),
        num_rounds=len(job.rounds),
        train_script="flare_client.py",
        train_args=f"{shlex.quote(folder)} {shlex.quote(result)}",
        server_expected_format=ExchangeFormat.PYTORCH,
        launch_external_process=True,
        command=f"{shlex.quote(sys.executable)} -u",
        key_metric="",
    )
    recipe.add_server_config({"server": {"task_request_interval": 0.05}})  # as in the other NVFlare engine
    with tempfile.TemporaryDirectory() as space:
        recipe.run(SimEnv(num_clients=len(job.clients), workspace_root=space))
    if not (Path(result) / "result.json").exists():
        raise SystemExit("the simulator ended without a result")


if __name__ == "__main__":
    main()
