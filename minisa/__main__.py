from minisa.interrupts import end_without_traceback

end_without_traceback()

from minisa.cli import main
from minisa.console import run

run(main)
