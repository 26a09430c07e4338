"""Named lists of expressions: Alpha158, Alpha360, and the 101 formulaic alphas.

Alpha158 and Alpha360 are Qlib's own lists; the 101 alphas are written with Qlib's
operators and the cross-sectional ones.

**How the 101 are written.** ``rank`` is `CSRank`, ``scale`` `CSScale`,
``indneutralize`` `CSDemean(x, $industry)` whatever level it names, ``ts_rank`` `Rank`,
``ts_argmax`` `IdxMax`, ``decay_linear(x, n)`` ``n * WMA(x, n)``, the factor left out
where a rank follows, the ``log`` of a ``product`` the `Sum` of `Log`, ``cap``
`$market_cap`, ``signedpower(x, a)`` ``Sign(x) * Power(Abs(x), a)``, ``adv{n}`` the mean
of `$amount`; windows that are no whole numbers are cut, as the paper says.

References
----------
Kakushadze (2016), 101 Formulaic Alphas, Wilmott 84, appendix A.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qlib.contrib.data.handler import Alpha158
from qlib.contrib.data.loader import Alpha360DL

__all__ = ["LISTS", "alpha101", "expressions_of"]

_SHORT = {"RET": "($close/Ref($close,1)-1)"}
_ADV = re.compile(r"ADV(\d+)")

_ALPHA101 = {
    1: "CSRank(IdxMax(Power(If(RET<0,Std(RET,20),$close),2),5))-0.5",
    2: "-1*Corr(CSRank(Delta(Log($volume),2)),CSRank(($close-$open)/$open),6)",
    3: "-1*Corr(CSRank($open),CSRank($volume),10)",
    4: "-1*Rank(CSRank($low),9)",
    5: "CSRank($open-Mean($vwap,10))*(-1*Abs(CSRank($close-$vwap)))",
    6: "-1*Corr($open,$volume,10)",
    7: "If(ADV20<$amount,-1*Rank(Abs(Delta($close,7)),60)*Sign(Delta($close,7)),0-1)",
    8: "-1*CSRank(Sum($open,5)*Sum(RET,5)-Ref(Sum($open,5)*Sum(RET,5),10))",
    9: "If(Min(Delta($close,1),5)>0,Delta($close,1),If(Max(Delta($close,1),5)<0,"
    "Delta($close,1),-1*Delta($close,1)))",
    10: "CSRank(If(Min(Delta($close,1),4)>0,Delta($close,1),"
    "If(Max(Delta($close,1),4)<0,Delta($close,1),-1*Delta($close,1))))",
    11: "(CSRank(Max($vwap-$close,3))+CSRank(Min($vwap-$close,3)))"
    "*CSRank(Delta($volume,3))",
    12: "Sign(Delta($volume,1))*(-1*Delta($close,1))",
    13: "-1*CSRank(Cov(CSRank($close),CSRank($volume),5))",
    14: "-1*CSRank(Delta(RET,3))*Corr($open,$volume,10)",
    15: "-1*Sum(CSRank(Corr(CSRank($high),CSRank($volume),3)),3)",
    16: "-1*CSRank(Cov(CSRank($high),CSRank($volume),5))",
    17: "-1*CSRank(Rank($close,10))*CSRank(Delta(Delta($close,1),1))"
    "*CSRank(Rank($amount/ADV20,5))",
    18: "-1*CSRank(Std(Abs($close-$open),5)+($close-$open)+Corr($close,$open,10))",
    19: "-1*Sign($close-Ref($close,7)+Delta($close,7))*(1+CSRank(1+Sum(RET,250)))",
    20: "-1*CSRank($open-Ref($high,1))*CSRank($open-Ref($close,1))"
    "*CSRank($open-Ref($low,1))",
    21: "If(Mean($close,8)+Std($close,8)<Mean($close,2),0-1,"
    "If(Mean($close,2)<Mean($close,8)-Std($close,8),1,If($amount/ADV20>=1,1,0-1)))",
    22: "-1*Delta(Corr($high,$volume,5),5)*CSRank(Std($close,20))",
    23: "If(Mean($high,20)<$high,-1*Delta($high,2),0)",
    24: "If(Delta(Mean($close,100),100)/Ref($close,100)<=0.05,"
    "-1*($close-Min($close,100)),-1*Delta($close,3))",
    25: "CSRank(-1*RET*ADV20*$vwap*($high-$close))",
    26: "-1*Max(Corr(Rank($volume,5),Rank($high,5),5),3)",
    27: "If(CSRank(Mean(Corr(CSRank($volume),CSRank($vwap),6),2))>0.5,0-1,1)",
    28: "CSScale(Corr(ADV20,$low,5)+($high+$low)/2-$close)",
    29: "Min(CSRank(CSRank(CSScale(Log("
    "Min(CSRank(CSRank(-1*CSRank(Delta($close-1,5)))),2))))),5)+Rank(Ref(-1*RET,6),5)",
    30: "(1-CSRank(Sign($close-Ref($close,1))+Sign(Ref($close,1)-Ref($close,2))"
    "+Sign(Ref($close,2)-Ref($close,3))))*Sum($volume,5)/Sum($volume,20)",
    31: "CSRank(CSRank(CSRank(WMA(-1*CSRank(CSRank(Delta($close,10))),10))))"
    "+CSRank(-1*Delta($close,3))+Sign(CSScale(Corr(ADV20,$low,12)))",
    32: "CSScale(Mean($close,7)-$close)+20*CSScale(Corr($vwap,Ref($close,5),230))",
    33: "CSRank(-1*(1-$open/$close))",
    34: "CSRank(1-CSRank(Std(RET,2)/Std(RET,5))+(1-CSRank(Delta($close,1))))",
    35: "Rank($volume,32)*(1-Rank($close+$high-$low,16))*(1-Rank(RET,32))",
    36: "2.21*CSRank(Corr($close-$open,Ref($volume,1),15))+0.7*CSRank($open-$close)"
    "+0.73*CSRank(Rank(Ref(-1*RET,6),5))+CSRank(Abs(Corr($vwap,ADV20,6)))"
    "+0.6*CSRank((Mean($close,200)-$open)*($close-$open))",
    37: "CSRank(Corr(Ref($open-$close,1),$close,200))+CSRank($open-$close)",
    38: "-1*CSRank(Rank($close,10))*CSRank($close/$open)",
    39: "-1*CSRank(Delta($close,7)*(1-CSRank(9*WMA($amount/ADV20,9))))"
    "*(1+CSRank(Sum(RET,250)))",
    40: "-1*CSRank(Std($high,10))*Corr($high,$volume,10)",
    41: "Power($high*$low,0.5)-$vwap",
    42: "CSRank($vwap-$close)/CSRank($vwap+$close)",
    43: "Rank($amount/ADV20,20)*Rank(-1*Delta($close,7),8)",
    44: "-1*Corr($high,CSRank($volume),5)",
    45: "-1*CSRank(Mean(Ref($close,5),20))*Corr($close,$volume,2)"
    "*CSRank(Corr(Sum($close,5),Sum($close,20),2))",
    46: "If((Ref($close,20)-Ref($close,10))/10-(Ref($close,10)-$close)/10>0.25,0-1,"
    "If((Ref($close,20)-Ref($close,10))/10-(Ref($close,10)-$close)/10<0,1,"
    "-1*($close-Ref($close,1))))",
    47: "CSRank(1/$close)*$amount/ADV20*$high*CSRank($high-$close)/Mean($high,5)"
    "-CSRank($vwap-Ref($vwap,5))",
    48: "CSDemean(Corr(Delta($close,1),Delta(Ref($close,1),1),250)*Delta($close,1)"
    "/$close,$industry)/Sum(Power(Delta($close,1)/Ref($close,1),2),250)",
    49: "If((Ref($close,20)-Ref($close,10))/10-(Ref($close,10)-$close)/10<-0.1,1,"
    "-1*($close-Ref($close,1)))",
    50: "-1*Max(CSRank(Corr(CSRank($volume),CSRank($vwap),5)),5)",
    51: "If((Ref($close,20)-Ref($close,10))/10-(Ref($close,10)-$close)/10<-0.05,1,"
    "-1*($close-Ref($close,1)))",
    52: "(Ref(Min($low,5),5)-Min($low,5))*CSRank((Sum(RET,240)-Sum(RET,20))/220)"
    "*Rank($volume,5)",
    53: "-1*Delta((($close-$low)-($high-$close))/($close-$low),9)",
    54: "-1*($low-$close)*Power($open,5)/(($low-$high)*Power($close,5))",
    55: "-1*Corr(CSRank(($close-Min($low,12))/(Max($high,12)-Min($low,12))),"
    "CSRank($volume),6)",
    56: "-1*CSRank(Sum(RET,10)/Sum(Sum(RET,2),3))*CSRank(RET*$market_cap)",
    57: "-1*($close-$vwap)/(2*WMA(CSRank(IdxMax($close,30)),2))",
    58: "-1*Rank(WMA(Corr(CSDemean($vwap,$industry),$volume,3),7),5)",
    59: "-1*Rank(WMA(Corr(CSDemean($vwap,$industry),$volume,4),16),8)",
    60: "-1*(2*CSScale(CSRank((($close-$low)-($high-$close))/($high-$low)*$volume))"
    "-CSScale(CSRank(IdxMax($close,10))))",
    61: "(CSRank($vwap-Min($vwap,16))<CSRank(Corr($vwap,ADV180,17)))*1",
    62: "(CSRank(Corr($vwap,Sum(ADV20,22),9))<CSRank(((CSRank($open)+CSRank($open))"
    "<(CSRank(($high+$low)/2)+CSRank($high)))*1))*-1",
    63: "-1*(CSRank(WMA(Delta(CSDemean($close,$industry),2),8))"
    "-CSRank(WMA(Corr($vwap*0.318108+$open*0.681892,Sum(ADV180,37),13),12)))",
    64: "(CSRank(Corr(Sum($open*0.178404+$low*0.821596,12),Sum(ADV120,12),16))"
    "<CSRank(Delta(($high+$low)/2*0.178404+$vwap*0.821596,3)))*-1",
    65: "(CSRank(Corr($open*0.00817205+$vwap*0.99182795,Sum(ADV60,8),6))"
    "<CSRank($open-Min($open,13)))*-1",
    66: "-1*(CSRank(WMA(Delta($vwap,3),7))"
    "+Rank(WMA(($low-$vwap)/($open-($high+$low)/2),11),6))",
    67: "-1*Power(CSRank($high-Min($high,2)),"
    "CSRank(Corr(CSDemean($vwap,$industry),CSDemean(ADV20,$industry),6)))",
    68: "(Rank(Corr(CSRank($high),CSRank(ADV15),8),13)"
    "<CSRank(Delta($close*0.518371+$low*0.481629,1)))*-1",
    69: "-1*Power(CSRank(Max(Delta(CSDemean($vwap,$industry),2),4)),"
    "Rank(Corr($close*0.490655+$vwap*0.509345,ADV20,4),9))",
    70: "-1*Power(CSRank(Delta($vwap,1)),"
    "Rank(Corr(CSDemean($close,$industry),ADV50,17),17))",
    71: "Greater(Rank(WMA(Corr(Rank($close,3),Rank(ADV180,12),18),4),15),"
    "Rank(WMA(Power(CSRank($low+$open-($vwap+$vwap)),2),16),4))",
    72: "CSRank(8*WMA(Corr(($high+$low)/2,ADV40,8),10))"
    "/CSRank(2*WMA(Corr(Rank($vwap,3),Rank($volume,18),6),2))",
    73: "-1*Greater(CSRank(WMA(Delta($vwap,4),2)),"
    "Rank(WMA(-1*Delta($open*0.147155+$low*0.852845,2)"
    "/($open*0.147155+$low*0.852845),3),16))",
    74: "(CSRank(Corr($close,Sum(ADV30,37),15))"
    "<CSRank(Corr(CSRank($high*0.0261661+$vwap*0.9738339),CSRank($volume),11)))*-1",
    75: "(CSRank(Corr($vwap,$volume,4))<CSRank(Corr(CSRank($low),CSRank(ADV50),12)))*1",
    76: "-1*Greater(CSRank(WMA(Delta($vwap,1),11)),"
    "Rank(WMA(Rank(Corr(CSDemean($low,$industry),ADV81,8),19),17),19))",
    77: "Less(CSRank(WMA(($high+$low)/2+$high-($vwap+$high),20)),"
    "CSRank(WMA(Corr(($high+$low)/2,ADV40,3),5)))",
    78: "Power(CSRank(Corr(Sum($low*0.352233+$vwap*0.647767,19),Sum(ADV40,19),6)),"
    "CSRank(Corr(CSRank($vwap),CSRank($volume),5)))",
    79: "(CSRank(Delta(CSDemean($close*0.60733+$open*0.39267,$industry),1))"
    "<CSRank(Corr(Rank($vwap,3),Rank(ADV150,9),14)))*1",
    80: "-1*Power(CSRank(Sign(Delta(CSDemean($open*0.868128+$high*0.131872,"
    "$industry),4))),Rank(Corr($high,ADV10,5),5))",
    81: "(CSRank(Sum(Log(CSRank(Power(CSRank(Corr($vwap,Sum(ADV10,49),8)),4))),14))"
    "<CSRank(Corr(CSRank($vwap),CSRank($volume),5)))*-1",
    82: "-1*Less(CSRank(WMA(Delta($open,1),14)),"
    "Rank(WMA(Corr(CSDemean($volume,$industry),$open,17),6),13))",
    83: "CSRank(Ref(($high-$low)/Mean($close,5),2))*CSRank(CSRank($volume))"
    "/((($high-$low)/Mean($close,5))/($vwap-$close))",
    84: "Sign(Rank($vwap-Max($vwap,15),20))"
    "*Power(Abs(Rank($vwap-Max($vwap,15),20)),Delta($close,4))",
    85: "Power(CSRank(Corr($high*0.876703+$close*0.123297,ADV30,9)),"
    "CSRank(Corr(Rank(($high+$low)/2,3),Rank($volume,10),7)))",
    86: "(Rank(Corr($close,Sum(ADV20,14),6),20)<CSRank($close-$vwap))*-1",
    87: "-1*Greater(CSRank(WMA(Delta($close*0.369701+$vwap*0.630299,1),2)),"
    "Rank(WMA(Abs(Corr(CSDemean(ADV81,$industry),$close,13)),4),14))",
    88: "Less(CSRank(WMA(CSRank($open)+CSRank($low)-(CSRank($high)+CSRank($close)),8)),"
    "Rank(WMA(Corr(Rank($close,8),Rank(ADV60,20),8),6),2))",
    89: "Rank(WMA(Corr($low,ADV10,6),5),3)"
    "-Rank(WMA(Delta(CSDemean($vwap,$industry),3),10),15)",
    90: "-1*Power(CSRank($close-Max($close,4)),"
    "Rank(Corr(CSDemean(ADV40,$industry),$low,5),3))",
    91: "-1*(Rank(WMA(WMA(Corr(CSDemean($close,$industry),$volume,9),16),3),4)"
    "-CSRank(WMA(Corr($vwap,ADV30,4),2)))",
    92: "Less(Rank(WMA(($high+$low)/2+$close<$low+$open,14),18),"
    "Rank(WMA(Corr(CSRank($low),CSRank(ADV30),7),6),6))",
    93: "Rank(WMA(Corr(CSDemean($vwap,$industry),ADV81,17),19),7)"
    "/CSRank(WMA(Delta($close*0.524434+$vwap*0.475566,2),16))",
    94: "-1*Power(CSRank($vwap-Min($vwap,11)),"
    "Rank(Corr(Rank($vwap,19),Rank(ADV60,4),18),2))",
    95: "(CSRank($open-Min($open,12))"
    "<Rank(Power(CSRank(Corr(Sum(($high+$low)/2,19),Sum(ADV40,19),12)),5),11))*1",
    96: "-1*Greater(Rank(WMA(Corr(CSRank($vwap),CSRank($volume),3),4),8),"
    "Rank(WMA(IdxMax(Corr(Rank($close,7),Rank(ADV60,4),3),12),14),13))",
    97: "-1*(CSRank(WMA(Delta(CSDemean($low*0.721001+$vwap*0.278999,$industry),3),20))"
    "-Rank(WMA(Rank(Corr(Rank($low,7),Rank(ADV60,17),4),18),15),6))",
    98: "CSRank(WMA(Corr($vwap,Sum(ADV5,26),4),7))"
    "-CSRank(WMA(Rank(IdxMin(Corr(CSRank($open),CSRank(ADV15),20),8),6),8))",
    99: "(CSRank(Corr(Sum(($high+$low)/2,19),Sum(ADV60,19),8))"
    "<CSRank(Corr($low,$volume,6)))*-1",
    100: "-1*(1.5*CSScale(CSDemean(CSDemean("
    "CSRank((($close-$low)-($high-$close))/($high-$low)*$volume),$industry),$industry))"
    "-CSScale(CSDemean(Corr($close,CSRank(ADV20),5)-CSRank(IdxMin($close,30)),$industry)))"
    "*($amount/ADV20)",
    101: "($close-$open)/($high-$low+0.001)",
}


def alpha101() -> tuple[list[str], list[str]]:
    """Expressions and names (``ALPHA001``) of the formulaic alphas."""
    texts = []
    for text in _ALPHA101.values():
        for short, full in _SHORT.items():
            text = text.replace(short, full)
        texts.append(_ADV.sub(r"Mean($amount,\1)", text))
    return texts, [f"ALPHA{number:03d}" for number in _ALPHA101]


def _alpha158() -> tuple[list[str], list[str]]:
    return Alpha158.get_feature_config(None)  # it does not look at itself


#: Functions that give expressions and names, by the name of the list.
LISTS = {
    "alpha158": _alpha158,
    "alpha360": Alpha360DL.get_feature_config,
    "alpha101": alpha101,
}


def expressions_of(given: Any) -> tuple[list[str], list[str]]:
    """Expressions and names of what a handler was given.

    Parameters
    ----------
    given : str, list of str, or dict of str to str
        Name of a list, expressions, or expressions by name.

    Raises
    ------
    ValueError
        If it is empty, no such list exists, or a name comes twice.
    """
    if isinstance(given, str):
        if given not in LISTS:
            raise ValueError(
                f"`expressions`: no list is called {given!r}; there are "
                f"{', '.join(LISTS)}. One expression is a list of one."
            )
        expressions, names = LISTS[given]()
        return list(expressions), list(names)
    if isinstance(given, Mapping):
        expressions, names = [str(e) for e in given.values()], [str(n) for n in given]
    else:
        expressions = [str(e) for e in given or ()]
        names = list(expressions)
    if not expressions:
        raise ValueError("`expressions` is empty: give at least one.")
    if len(set(names)) < len(names):
        twice = sorted({n for n in names if names.count(n) > 1})
        raise ValueError(f"`expressions`: the name {twice[0]!r} comes twice.")
    return expressions, names
