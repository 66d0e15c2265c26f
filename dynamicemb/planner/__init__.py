"""What a TorchRec user's planning code touches: constraints with the flag, the enumerator, the planner, its result.

Path of a table through the files: ``constraints`` (what the user says) -> ``tables`` (found in the model, checked) ->
``capacity`` (every option filled in) -> ``enumerator`` with ``estimators`` (its one sharding option and its memory) ->
``planner`` (the plan, printed by ``stats``, agreed on by ``collective``) -> ``parameter_sharding`` (for the sharder).
"""

from dynamicemb.installation import require_torchrec

require_torchrec()  # before the first import of torchrec

from dynamicemb.planner.constraints import DynamicEmbParameterConstraints
from dynamicemb.planner.enumerator import DynamicEmbeddingEnumerator
from dynamicemb.planner.parameter_sharding import DynamicEmbParameterSharding
from dynamicemb.planner.planner import DynamicEmbeddingShardingPlanner

__all__ = [
    "DynamicEmbParameterConstraints",
    "DynamicEmbParameterSharding",
    "DynamicEmbeddingEnumerator",
    "DynamicEmbeddingShardingPlanner",
]
