"""The laws that every Memory keeps, as a public function.

report = check_laws(make_memory)  # LawBroken, or a table of what held
"""

from memtrain.testing.check import check_laws as check_laws
from memtrain.testing.laws import LAWS as LAWS
from memtrain.testing.report import LawBroken as LawBroken
from memtrain.testing.report import Outcome as Outcome
from memtrain.testing.report import Report as Report
from memtrain.testing.tolerances import TOLERANCES as TOLERANCES
