"""The laws that padding, packing, caching and the batch leave the answer unchanged, as a harness for any model."""

from qkv.laws.check import Report, Verdict, assert_laws, check
from qkv.laws.laws import LAWS, Law, Pair, Run
from qkv.laws.subject import ModelSubject, ModuleSubject, PairSubject, Subject

__all__ = [
    "LAWS",
    "Law",
    "ModelSubject",
    "ModuleSubject",
    "Pair",
    "PairSubject",
    "Report",
    "Run",
    "Subject",
    "Verdict",
    "assert_laws",
    "check",
]
