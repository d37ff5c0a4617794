"""Memory lookup: exact top-k over many keys, product-key top-k, the weighted gather of value rows.

Plain JAX, for every device. What they have in common: ties are settled by position, never by
layout, and sums over rows have a fixed order.
"""

from memtrain_kernels.lookup.gather_costs import GatherCost as GatherCost
from memtrain_kernels.lookup.gather_costs import gather_costs as gather_costs
from memtrain_kernels.lookup.memory_topk import memory_topk as memory_topk
from memtrain_kernels.lookup.partition import (
    partitioned_product_key_lookup as partitioned_product_key_lookup,
)
from memtrain_kernels.lookup.partition import (
    partitioned_weighted_gather as partitioned_weighted_gather,
)
from memtrain_kernels.lookup.partition import tables_over as tables_over
from memtrain_kernels.lookup.product_key import product_key_topk as product_key_topk
from memtrain_kernels.lookup.product_key_lookup import product_key_lookup as product_key_lookup
from memtrain_kernels.lookup.row_gradients import NO_ROW as NO_ROW
from memtrain_kernels.lookup.row_gradients import RowGradients as RowGradients
from memtrain_kernels.lookup.row_gradients import merge_row_gradients as merge_row_gradients
from memtrain_kernels.lookup.row_gradients import (
    weighted_gather_row_gradients as weighted_gather_row_gradients,
)
from memtrain_kernels.lookup.sharded_gather import (
    sharded_weighted_gather as sharded_weighted_gather,
)
from memtrain_kernels.lookup.sharded_topk import sharded_memory_topk as sharded_memory_topk
from memtrain_kernels.lookup.topk_attention import KeyedValues as KeyedValues
from memtrain_kernels.lookup.topk_attention import TopKAttention as TopKAttention
from memtrain_kernels.lookup.topk_attention import topk_attention as topk_attention
from memtrain_kernels.lookup.weighted_gather import weighted_gather as weighted_gather
