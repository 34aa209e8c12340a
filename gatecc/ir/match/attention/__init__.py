"""Attention sites: found by one walk over the graph, and put together from what lies around the softmax."""

from gatecc.ir.match.attention.walk import match_attention as match_attention
