"""Messages over NVIDIA FLARE: the engine carries them between a server's and its sites' resident processes.

Nothing of a run lives in the engine's own processes, which come and go with its jobs: :mod:`.controller`
and :mod:`.executor` only pass messages on between the network and the resident processes beside them, over
a local connection (:mod:`.bridge`). So the base model, a site's memory and the run outlive every job.
"""
