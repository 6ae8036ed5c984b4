"""Messages over NVIDIA FLARE between the server's process and the sites' resident processes.

The engine's own processes come and go with its jobs and hold no state of a run: :mod:`.controller` and
:mod:`.executor` pass messages between the network and the resident process beside them, over a local
connection (:mod:`.bridge`). So the base model, a site's memory and the run outlive every job.
"""
