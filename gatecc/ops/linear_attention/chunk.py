from gatecc.ops.linear_attention.reference import recurrence as chunked
