"""Making triplets: pairs of captions that differ in a phrase, edits, relative captions, filters, and the report."""

from .instruct import InstructWriter, load_writer
from .pipeline import Making, make_triplets
from .triplet_report import report_on
from .vocabulary import load_vocabulary

__all__ = ["InstructWriter", "Making", "load_vocabulary", "load_writer", "make_triplets", "report_on"]
