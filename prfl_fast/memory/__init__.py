"""What a network call keeps and recomputes under a byte budget: plans, recomputed blocks, live bytes, the planner."""

from prfl_fast.memory.plan import InfeasibleBudget
from prfl_fast.memory.solver.chain import ChainPlan, Mode, solve_chain

__all__ = ["ChainPlan", "InfeasibleBudget", "Mode", "solve_chain"]
