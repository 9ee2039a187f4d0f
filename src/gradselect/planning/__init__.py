"""What a training run will hold and how long its steps take, before it begins. Importing it needs torch alone."""

from ._memory import Bytes as Bytes
from ._plan import Plan as Plan
from ._plan import plan as plan
from ._steps import Step as Step
