"""Memory lookup: product-key top-k and the weighted gather of value rows."""

from memtrain_kernels.lookup.product_key import product_key_topk as product_key_topk
from memtrain_kernels.lookup.weighted_gather import weighted_gather as weighted_gather
